"""How TFDS reads a record.

TFDS imports this module itself: features.json of every existing dataset names `data_pipeline.features.Slices`, so the class
stays at this path.
"""

from collections.abc import Sequence

import numpy as np
import tensorflow_datasets as tfds
from jaxtyping import Shaped, UInt16

from data_pipeline.format import codec, records
from data_pipeline.format.files import Json


class Slices(tfds.features.FeatureConnector):
    """Encoded slices of a record, decoded to uint16 (slices, height, width); the record's slices have one size."""

    def get_tensor_info(self) -> tfds.features.TensorInfo:
        return tfds.features.TensorInfo(shape=(None, None, None), dtype=np.uint16)

    def get_serialized_info(self) -> tfds.features.TensorInfo:
        return tfds.features.TensorInfo(shape=(None,), dtype=np.object_)

    def encode_example(self, example_data: Sequence[np.ndarray]) -> list[bytes]:
        return [codec.encode(pixels) for pixels in example_data]

    def decode_example(self, tfexample_data: object) -> None:
        raise NotImplementedError(
            "these slices are decoded without TensorFlow: use as_data_source() instead of as_dataset()"
        )

    def decode_example_np(
        self, example_data: bytes | Shaped[np.ndarray, " slices"] | Sequence[bytes]
    ) -> UInt16[np.ndarray, "slices height width"]:
        data = [example_data] if isinstance(example_data, bytes) else example_data
        first = codec.decode(data[0])
        pixels = np.empty((len(data), *first.shape), np.uint16)
        pixels[0] = first
        codec.decode_into(data[1:], pixels[1:])
        return pixels

    def to_json_content(self) -> Json:
        return {}

    @classmethod
    def from_json_content(cls, value: object) -> "Slices":
        return cls()


def features() -> tfds.features.FeaturesDict:
    """The record schema of records.py in TFDS terms."""
    fields: dict = {"slices": Slices()}
    fields |= {name: tfds.features.Text() for name in records.TEXT}
    fields |= {name: np.float32 for name in records.NUMBERS}
    fields |= {name: tfds.features.Tensor(shape=(n,), dtype=np.float32) for name, n in records.VECTORS.items()}
    fields |= {name: tfds.features.Tensor(shape=(None,), dtype=np.float32) for name in records.SLICE_NUMBERS}
    fields |= {name: tfds.features.Tensor(shape=(None,), dtype=np.int64) for name in records.SLICE_INTEGERS}
    fields |= {name: tfds.features.Tensor(shape=(None,), dtype=np.str_) for name in records.SLICE_TEXT}
    fields[records.SLICE_BOX] = tfds.features.Tensor(shape=(None, 4), dtype=np.int64)
    return tfds.features.FeaturesDict(fields)
