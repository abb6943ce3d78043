"""What the launchers run before a script: none of it needs more than the standard library to be loaded."""
