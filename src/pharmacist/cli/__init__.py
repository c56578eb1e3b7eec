"""The command line: one declaration of options per stage."""
