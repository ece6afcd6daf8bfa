"""The engine: pieces that make the same training faster or smaller. Each stands alone and can be switched off."""
