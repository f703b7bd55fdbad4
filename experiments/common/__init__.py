"""Parts that every experiment shares."""
