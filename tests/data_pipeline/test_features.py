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
    np.testing.assert_array_equal(
        connector.decode_example_np(encoded[0]), pixels[:1]
    )  # TFDS hands over a single one bare


def test_the_description_of_a_dataset_leads_back_to_the_features() -> None:
    described = json.loads(json.dumps(features.features().to_json()))
    again = tfds.features.FeaturesDict.from_json(described)
    assert isinstance(again["slices"], features.Slices)
    assert set(again) == set(features.features())
    assert again["slices"].get_tensor_info() == tfds.features.TensorInfo(shape=(None, None, None), dtype=np.uint16)


def test_reading_through_tensorflow_says_what_to_do_instead() -> None:
    with pytest.raises(NotImplementedError, match="as_data_source"):
        features.Slices().decode_example(None)
