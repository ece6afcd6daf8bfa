"""A finished adapter, or a base, in the form that other programs read: each form read again and compared."""
