"""Files that are whole or absent, locks, and what strangers wrote. Nothing in here knows what a file is about."""
