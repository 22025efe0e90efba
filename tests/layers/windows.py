"""Windows of pools on small images."""

WINDOWS = [  # kernel, stride, padding, height, width
    (2, None, 0, 4, 4),
    (2, None, 0, 5, 7),
    (3, 2, 1, 5, 6),
    (3, 1, 1, 4, 3),
    ((2, 3), (1, 2), (1, 0), 4, 5),
    (1, 2, 0, 3, 3),
    (4, 3, 2, 6, 5),
]
