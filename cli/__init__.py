"""The command line: `main.py` finds the command, one file a command holds its options."""
