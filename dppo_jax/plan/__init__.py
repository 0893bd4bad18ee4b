"""`dppo plan`: a recipe's programs compiled for hardware that is not here."""
