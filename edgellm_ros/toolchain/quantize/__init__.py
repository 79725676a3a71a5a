"""`edgellm quantize`: what a recipe is, what it is calibrated with, and how ModelOpt carries it out."""
