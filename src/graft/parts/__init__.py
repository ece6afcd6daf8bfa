"""What a method puts into a base, and the hooks that carry it. Nothing here knows any method."""
