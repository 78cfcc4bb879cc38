"""What dev.py is made of. Not part of the node pack: nothing in loader/, quantizer/ or nodes/ imports it."""
