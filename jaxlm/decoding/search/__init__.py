"""Methods that look for probable texts, one file each."""
