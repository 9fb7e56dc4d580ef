"""What ``amil demo`` shows: :mod:`~amil_fast.demo.bags`, a made-up multiple-instance problem, and
:mod:`~amil_fast.demo.figures`, the pose model on drawn figures."""
