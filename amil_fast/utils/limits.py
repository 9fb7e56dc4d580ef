"""Stated limits of inputs; docs/reliability.md lists them."""

MAX_IMAGE_PIXELS = 1 << 27  # of an image or video frame, 0.4 GB decoded
MAX_IMAGE_BYTES = 1 << 28  # of an encoded image
MAX_COORDINATE = 1e6  # of bounding boxes and joints, in pixels
MAX_CROP = 4096  # side of crops in pixels
MAX_SEED = 2**32 - 1
MAX_COUNT = 2**31 - 1  # of epochs, bags or crops in a batch, samples, ...
MAX_ITERS = 1000  # of adjust pooling
MAX_WIDTH, MAX_DEPTH = 1 << 16, 1000  # of networks
