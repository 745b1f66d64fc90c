import json

import numpy as np
import pytest
import tensorflow_datasets as tfds

from data_pipeline import features


def test_slices_round_trip_through_tfds() -> None:
    connector = features.Slices()
    pixels = np.random.default_rng(0).integers(0, 65536, (3, 20, 30)).astype(np.uint16)
    encoded = connector.encode_example(list(pixels))
    np.testing.assert_array_equal(connector.decode_example_np(encoded), pixels)
    # TFDS passes a single slice without a list.
    np.testing.assert_array_equal(connector.decode_example_np(encoded[0]), pixels[:1])


def test_features_json_names_the_feature_class() -> None:
    described = json.loads(json.dumps(features.features().to_json()))
    again = tfds.features.FeaturesDict.from_json(described)
    assert isinstance(again["slices"], features.Slices)
    assert "data_pipeline.features.Slices" in json.dumps(described)  # existing datasets name this path
    assert set(again) == set(features.features())
    assert again["slices"].get_tensor_info() == tfds.features.TensorInfo(shape=(None, None, None), dtype=np.uint16)


def test_as_dataset_error_names_as_data_source() -> None:
    with pytest.raises(NotImplementedError, match="as_data_source"):
        features.Slices().decode_example(None)
