import numpy as np
import pytest
import torch
from transformers import BertConfig, BertModel, BertTokenizerFast

from helpers.files import DataError
from helpers.metadata import SCHEMA
from helpers.text import encode, item_text, load_encoder

TEXTS = {5: "toy story", 3: "a film about toys who fear a new rival in town", 9: "heat", 1: "golden eye crime comedy"}
WORDS = sorted({word for text in TEXTS.values() for word in text.split()})


def film(**known):
    return {**SCHEMA, **known}


def masked_mean(hidden, mask):
    mask = mask.unsqueeze(2)
    return (hidden * mask).sum(dim=1) / mask.sum(dim=1)


def plain_mean(hidden, mask):
    return hidden.mean(dim=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bert")
    vocab = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    (folder / "vocab.txt").write_text("\n".join(vocab) + "\n")
    torch.manual_seed(0)
    config = BertConfig(vocab_size=len(vocab), hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
                        intermediate_size=32, max_position_embeddings=32)
    BertModel(config).save_pretrained(folder)
    BertTokenizerFast.from_pretrained(folder).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def encoder(folder):
    return load_encoder(folder)


def test_text_has_title_year_genres_tagline_and_overview():
    info = film(title="Heat", release_year=1995, genres=["Crime", "Drama"], tagline="A Los Angeles crime saga",
                overview="A thief plans a last job")
    assert item_text(info) == "Heat (1995). Crime, Drama. A Los Angeles crime saga. A thief plans a last job"


@pytest.mark.parametrize("known, expected", [
    ({"title": "Heat"}, "Heat"),
    ({"title": "Heat", "release_year": 1995}, "Heat (1995)"),
    ({"title": "Heat", "genres": ["Crime"]}, "Heat. Crime"),
    ({"title": "Heat", "tagline": "  ", "overview": " A thief. "}, "Heat. A thief."),
    ({"title": "Heat", "tagline": "", "genres": ["Crime"], "overview": "A thief"}, "Heat. Crime. A thief"),
])
def test_missing_parts_leave_no_trace(known, expected):
    assert item_text(film(**known)) == expected


def test_encoder_comes_in_evaluation_mode(encoder):
    assert not encoder[1].training


def test_words_of_the_vocabulary_are_known(encoder):
    tokens = encoder[0]("toy heat [PAD]")["input_ids"]
    assert encoder[0].unk_token_id not in tokens and len(tokens) == 5


def test_vector_is_the_same_alone_and_padded_in_a_batch(encoder):
    together = encode(TEXTS, *encoder, masked_mean)
    for item_id, text in TEXTS.items():
        alone = encode({item_id: text}, *encoder, masked_mean)[item_id]
        np.testing.assert_allclose(together[item_id], alone, rtol=0, atol=1e-5)


def test_a_mean_over_the_padding_would_be_noticed(encoder):
    together = encode(TEXTS, *encoder, plain_mean)
    alone = encode({9: TEXTS[9]}, *encoder, plain_mean)[9]
    assert np.abs(together[9] - alone).max() > 1e-2


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_vectors_keep_the_order_and_the_ids_of_the_texts(encoder, batch_size):
    vectors = encode(TEXTS, *encoder, masked_mean, batch_size=batch_size)
    assert list(vectors) == [5, 3, 9, 1]
    whole = encode(TEXTS, *encoder, masked_mean)
    for item_id, vector in vectors.items():
        assert vector.dtype == np.float32 and vector.shape == (16,)
        np.testing.assert_allclose(vector, whole[item_id], rtol=0, atol=1e-5)


def test_different_texts_have_different_vectors(encoder):
    vectors = list(encode(TEXTS, *encoder, masked_mean).values())
    assert all(np.abs(a - b).max() > 1e-2 for i, a in enumerate(vectors) for b in vectors[:i])


def test_long_text_is_cut_at_max_length(encoder):
    lengths = []

    def pool(hidden, mask):
        lengths.append(hidden.shape[1])
        return masked_mean(hidden, mask)

    encode({1: "toy " * 100}, *encoder, pool, max_length=8)
    assert lengths == [8]


def test_no_texts_give_no_vectors(encoder):
    assert encode({}, *encoder, masked_mean) == {}


@pytest.mark.parametrize("files", [{}, {"config.json": "{}"}, {"config.json": "not json"}])
def test_folder_without_a_transformer_gets_a_sentence(raw, files):
    folder = raw(files)
    with pytest.raises(DataError, match=f"{folder.name} holds no transformer"):
        load_encoder(folder)


def test_folder_without_weights_gets_a_sentence(raw, folder):
    part = raw({path.name: path.read_bytes() for path in folder.iterdir() if path.suffix != ".safetensors"})
    with pytest.raises(DataError, match="holds no transformer"):
        load_encoder(part)


def test_truncated_weights_get_a_sentence(raw, folder):
    part = raw({path.name: path.read_bytes() for path in folder.iterdir()})
    weights = part / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(DataError, match="holds no transformer"):
        load_encoder(part)
