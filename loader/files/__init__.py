"""What a file is: bytes, header and tables of tensors, the models that these may be, the errors when they are not."""
