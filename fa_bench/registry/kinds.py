"""The kinds of inputs and targets, which determine which datasets, architectures and objectives fit together.

In shapes, N is the batch size, T the length of a sequence, F the number of features, O the number of outputs, and C, H and W the
channels, height and width of images.
"""

from __future__ import annotations

#: Kinds of inputs: float32 (N, C, H, W); float32 (N, F); int64 (N, T), indices of tokens in a vocabulary.
IMAGES, FEATURES, TOKENS = "images", "features", "tokens"
#: Kinds of targets: class indices, int64 (N,); real numbers, float32 (N, O); a class for each position, int64 (N, T).
CLASSES, VALUES, POSITIONS = "classes", "values", "positions"
#: The singular and the plural noun for samples, by the kind of inputs.
NOUNS = {IMAGES: ("image", "images"), FEATURES: ("sample", "samples"), TOKENS: ("sequence", "sequences")}
