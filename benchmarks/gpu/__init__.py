"""What GPUs make of packed weights: measured where there is one (``run``), computed for those that are not here
(``cards``)."""
