"""What a scale is and how it is chosen, for any front end: no Chainer, no CuPy and no PyTorch in here."""
