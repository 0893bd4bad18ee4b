"""The verbs of `dppo`, by what they are about; heavy imports happen inside them."""
