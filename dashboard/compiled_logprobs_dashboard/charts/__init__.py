"""Tables to figures: pure functions, one file for each page that has some."""
