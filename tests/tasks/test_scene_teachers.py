"""Teachers of pictures and sentences: a tiny model of transformers, a run of CLIP, a text encoder; errors."""

import types

import pytest
import torch
import transformers

from counterpoint.encoders.text import train_bpe
from counterpoint.errors import CounterpointError
from counterpoint.tasks.scene_teachers import check_class_text, check_scene_teacher, resized, scene_teacher, text_rows
from counterpoint.views.images import denormalise, normalise

SIDE = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Save a tiny CLIP with its tokenizer."""
    folder = tmp_path_factory.mktemp("clip")
    tokenizer = train_bpe(["a road with a tree and a car"], 300)
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.model, pad_token="[PAD]", eos_token="[END]"
    ).save_pretrained(folder)
    config = transformers.CLIPConfig(
        text_config=SIDE | {"vocab_size": tokenizer.vocabulary, "eos_token_id": 2, "max_position_embeddings": 20},
        vision_config=SIDE | {"image_size": 32, "patch_size": 8},
        projection_dim=12,
    )
    torch.manual_seed(0)
    transformers.CLIPModel(config).save_pretrained(folder)
    return folder


def test_a_model_like_clip_embeds_pictures_with_its_own_normalisation_and_sentences(folder):
    teacher = scene_teacher(f"hf:{folder}")
    model = transformers.CLIPModel.from_pretrained(folder).eval()
    pictures = normalise(torch.rand(2, 3, 16, 16))
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    given = normalise(denormalise(resized(pictures, 32)), mean, std)
    with torch.no_grad():
        image = teacher.module.image("depth", pictures)
        text = teacher.module.text(["a road", "a tree and a car"])
        alone = teacher.module.text(["a road"])
        wanted = model.get_image_features(pixel_values=given)
    wanted = wanted if isinstance(wanted, torch.Tensor) else wanted.pooler_output
    torch.testing.assert_close(image, wanted)
    assert image.shape == text.shape == (2, 12)
    torch.testing.assert_close(text[:1], alone, rtol=1e-4, atol=1e-5)  # padding does not change a sentence
    assert not any(p.requires_grad for p in teacher.module.parameters())


def test_equal_sentences_are_embedded_once():
    asked = []

    def embed(texts):
        asked.extend(texts)
        return torch.tensor([[3.0 * len(text), 4.0 * len(text)] for text in texts])

    found = text_rows(embed, ["b", "aa", "b"])
    assert asked == ["aa", "b"]
    torch.testing.assert_close(found, torch.tensor([[0.6, 0.8]] * 3))


@pytest.mark.parametrize("name", ["clip", "run:", "timm:resnet18", "minilm"])
def test_names_of_no_teacher_are_refused(name):
    with pytest.raises(CounterpointError, match="unknown teacher"):
        check_scene_teacher(name)


def test_a_missing_model_names_the_way_without_a_network(tmp_path):
    with pytest.raises(CounterpointError, match=r"could not be loaded: .*train clip on the same data"):
        scene_teacher(f"hf:{tmp_path / 'none'}")


def test_a_model_of_one_side_is_refused(folder, tmp_path):
    transformers.BertModel(transformers.BertConfig(**SIDE, vocab_size=300)).save_pretrained(tmp_path)
    transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path)
    with pytest.raises(CounterpointError, match="is a BertModel, which does not embed pictures and sentences"):
        scene_teacher(f"hf:{tmp_path}")


def test_a_learner_without_sentences_is_refused(monkeypatch):
    from counterpoint.tasks import scene_teachers

    monkeypatch.setattr(scene_teachers, "frozen", lambda name: types.SimpleNamespace(module=torch.nn.Identity()))
    with pytest.raises(CounterpointError, match="does not embed pictures and sentences; name a run of clip"):
        scene_teacher("run:somewhere")


def test_untrained_class_texts_are_refused():
    check_class_text("")
    check_class_text("minilm")
    with pytest.raises(CounterpointError, match="no weights to learn from"):
        check_class_text("text-s")
