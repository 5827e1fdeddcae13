"""Models that answer with masks and their classes, against the post-processing of transformers."""

from types import SimpleNamespace

import pytest
import torch
from transformers import (
    CLIPTokenizer,
    EomtConfig,
    EomtForUniversalSegmentation,
    EomtImageProcessor,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    Mask2FormerImageProcessor,
    MaskFormerConfig,
    MaskFormerForInstanceSegmentation,
    MaskFormerImageProcessor,
    OneFormerConfig,
    OneFormerForUniversalSegmentation,
    OneFormerImageProcessor,
    OneFormerProcessor,
    SwinConfig,
)

from kd_trainer.loading import load_measured, load_student
from kd_trainer.teacher import TeacherInference, load_teacher
from kd_trainer.universal import semantic_logits

SIDE = 64
NAMES = dict(enumerate(["sky", "person", "rider", "road", "car", "dog", "cat"]))
PERSON = {0: "background", 1: "person"}


def backbone():
    return SwinConfig(
        image_size=SIDE,
        embed_dim=8,
        depths=[1, 1, 1, 1],
        num_heads=[1, 1, 1, 1],
        window_size=2,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )


def mask2former():
    config = Mask2FormerConfig(
        backbone_config=backbone(),
        feature_size=32,
        mask_feature_size=32,
        hidden_dim=32,
        encoder_feedforward_dim=16,
        encoder_layers=1,
        decoder_layers=2,
        num_attention_heads=2,
        dim_feedforward=16,
        num_queries=5,
        id2label=NAMES,
    )
    return Mask2FormerForUniversalSegmentation(config)


def maskformer():
    config = MaskFormerConfig(
        backbone_config=backbone(), fpn_feature_size=32, mask_feature_size=32, id2label=NAMES
    )
    detr = config.decoder_config
    detr.d_model, detr.decoder_layers, detr.decoder_ffn_dim, detr.num_queries = 16, 1, 16, 5
    detr.encoder_attention_heads = detr.decoder_attention_heads = 2
    return MaskFormerForInstanceSegmentation(config)


def eomt():
    config = EomtConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=SIDE,
        patch_size=16,
        num_blocks=1,
        num_upscale_blocks=1,
        num_queries=5,
        id2label=NAMES,
    )
    return EomtForUniversalSegmentation(config)


def oneformer(**options):
    config = OneFormerConfig(
        backbone_config=backbone(),
        num_queries=5,
        conv_dim=32,
        mask_dim=32,
        hidden_dim=32,
        encoder_feedforward_dim=16,
        encoder_layers=1,
        decoder_layers=2,
        num_attention_heads=2,
        dim_feedforward=16,
        task_seq_len=30,
        text_encoder_width=64,
        text_encoder_num_layers=1,
        text_encoder_vocab_size=50,
        text_encoder_n_ctx=2,
        id2label=NAMES,
        **options,
    )
    return OneFormerForUniversalSegmentation(config)


def words():
    """A tokenizer that spells: each letter, and each at the end of a word, is a token."""
    letters = sorted(set("the task is semantic, instance, panoptic") - set(" ,"))
    tokens = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{x}</w>" for x in letters)]
    return CLIPTokenizer(vocab={token: index for index, token in enumerate(tokens)}, merges=[])


def oneformer_processor():
    return OneFormerProcessor(OneFormerImageProcessor(), words(), task_seq_length=30)


MODELS = {
    "oneformer": (oneformer, oneformer_processor(), {}),
    "mask2former": (mask2former, Mask2FormerImageProcessor(), {}),
    "maskformer": (maskformer, MaskFormerImageProcessor(), {}),
    "eomt": (eomt, EomtImageProcessor(), {"size": {"shortest_edge": SIDE, "longest_edge": None}}),
}


def louder(network):
    """Weights whose answers differ from pixel to pixel and from class to class."""
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.ndim > 1:
                parameter.mul_(2)
    return network.eval()


@pytest.fixture(params=MODELS)
def saved(request, tmp_path):
    make, processor, options = MODELS[request.param]
    torch.manual_seed(3)
    network = louder(make())
    network.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    return SimpleNamespace(
        path=str(tmp_path), network=network, processor=processor, options=options
    )


def test_a_universal_model_gives_the_logits_of_transformers_own_post_processing(saved):
    """Another order of sigmoid, product and resize is another map at every edge."""
    pixels = torch.randn(2, 3, SIDE, SIDE)
    teacher = load_teacher(saved.path, num_labels=None)
    logits = teacher(pixels)
    assert logits.shape == (2, 7, SIDE, SIDE)
    asked = {}
    if "task" in dict(teacher.network.named_buffers()):
        image = torch.zeros(SIDE, SIDE, 3, dtype=torch.uint8).numpy()
        asked = dict(saved.processor(image, ["semantic"], return_tensors="pt"))
        asked = {"task_inputs": asked["task_inputs"].expand(2, -1)}
    with torch.no_grad():
        output = saved.network(pixels, **asked)
    found = saved.processor.post_process_semantic_segmentation(
        output,
        target_sizes=[(SIDE, SIDE)] * 2,
        return_segmentation_scores=True,
        **saved.options,
    )
    scores = torch.stack([one.segmentation_scores for one in found])
    assert scores.std() > 1e-4  # else everything is equal to everything
    torch.testing.assert_close(logits, scores.clamp(1e-6).log(), rtol=1e-5, atol=1e-5)
    classes = torch.stack([one.segmentation for one in found])
    first, second = scores.topk(2, dim=1).values.unbind(1)
    clear = (first > second * 1.0001) & (first > 1e-5)  # random weights leave classes that tie
    assert clear.float().mean() > 0.2
    assert torch.equal(logits.argmax(1)[clear], classes[clear])


def test_a_universal_model_is_translated_by_a_class_map(saved):
    """Scores of merged classes are added before the logarithm."""
    pixels = torch.randn(1, 3, SIDE, SIDE)
    whole = load_teacher(saved.path, num_labels=None)(pixels).exp()
    teacher = load_teacher(
        saved.path, num_labels=2, id2label=PERSON, class_map="person=person+rider"
    )
    z = teacher(pixels)
    assert z.shape == (1, 1, SIDE, SIDE)
    ours, rest = whole[:, 1:3].sum(1), whole[:, [0, 3, 4, 5, 6]].sum(1)
    inside = (ours > 1e-3) & (rest > 1e-3)  # away from the floor, which each class has
    assert inside.float().mean() > 0.2
    expected = ours.log() - rest.log()
    torch.testing.assert_close(z[:, 0][inside], expected[inside], rtol=0.01, atol=0.01)
    # The copy that a training asks, with weights cast once.
    fast = TeacherInference(teacher, precision="bf16")
    with torch.autocast("cpu", torch.bfloat16):
        rounded = fast(pixels)
    assert rounded.dtype == torch.float32
    assert (rounded - z).abs().mean() < 0.1 * z.abs().mean() + 0.05


def test_where_no_query_says_anything_the_logits_are_finite():
    """The logarithm of no probability at all would make the whole loss infinite."""
    output = SimpleNamespace(
        class_queries_logits=torch.tensor([[[0.0, 0.0, 500.0]]]),
        masks_queries_logits=torch.full((1, 1, 4, 4), -500.0),
    )
    logits = semantic_logits(output, (8, 8), masks_at=None)
    assert torch.isfinite(logits).all()
    assert logits.shape == (1, 2, 8, 8)


def test_a_network_of_one_input_size_gets_that_size(tmp_path):
    """EoMT's positions are a table: images of the student's size would not fit it."""
    louder(eomt()).save_pretrained(tmp_path)
    teacher = load_teacher(str(tmp_path), num_labels=None)
    assert teacher.image_size == (SIDE, SIDE)
    assert teacher(torch.randn(1, 3, 96, 96)).shape == (1, 7, 96, 96)
    with pytest.raises(ValueError, match=f"Expected --teacher_image_size {SIDE}"):
        load_teacher(str(tmp_path), num_labels=None, image_size=128)


def test_a_oneformer_answers_for_its_task_and_no_other(tmp_path):
    """Its masks depend on the words; those of another task are not those of semantic classes."""
    network = louder(oneformer())
    network.save_pretrained(tmp_path)
    words().save_pretrained(tmp_path)
    teacher = load_teacher(str(tmp_path), num_labels=None)
    pixels = torch.randn(1, 3, SIDE, SIDE)
    found = teacher(pixels)
    told = words()(["the task is instance"], padding="max_length", max_length=30)
    teacher.network.task = torch.tensor(told["input_ids"]) * torch.tensor(told["attention_mask"])
    assert (teacher(pixels) - found).abs().max() > 1e-3


def test_a_fine_tuned_oneformer_does_not_drop_out_and_wants_no_texts(tmp_path):
    """Its saved `is_training` would turn dropout on in eval mode, and crash for want of texts."""
    torch.manual_seed(0)
    louder(oneformer(is_training=True, dropout=0.9)).save_pretrained(tmp_path)
    words().save_pretrained(tmp_path)
    teacher = load_teacher(str(tmp_path), num_labels=None)
    pixels = torch.randn(1, 3, SIDE, SIDE)
    assert torch.equal(teacher(pixels), teacher(pixels))


def test_a_oneformer_without_its_words_is_refused(tmp_path):
    """transformers makes an empty tokenizer then, which says something else to the network."""
    oneformer().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"Expected the tokenizer of a OneFormer.*Save its"):
        load_teacher(str(tmp_path), num_labels=None)


def test_statistics_in_the_file_of_a_whole_processor_are_found(tmp_path):
    """transformers 5 nests the image processor there; ImageNet's would be taken in silence."""
    oneformer().save_pretrained(tmp_path)
    images = OneFormerImageProcessor(image_mean=[0.2, 0.3, 0.4], image_std=[0.1, 0.2, 0.3])
    OneFormerProcessor(images, words()).save_pretrained(tmp_path)
    assert not (tmp_path / "preprocessor_config.json").exists()
    teacher = load_teacher(str(tmp_path), num_labels=None)
    assert teacher.mean == pytest.approx([0.2, 0.3, 0.4])
    assert teacher.std == pytest.approx([0.1, 0.2, 0.3])


def test_models_of_other_kinds_are_refused_by_name(tmp_path):
    """The kinds that can teach are listed, so that one can be chosen."""
    SwinConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"'swin'.*a mask2former, maskformer, oneformer"):
        load_teacher(str(tmp_path), num_labels=2)


def test_a_universal_model_is_measured_as_it_teaches_and_is_no_student(saved):
    """As a student its queries were counted as classes."""
    measured = load_measured(saved.path)
    pixels = torch.randn(1, 3, SIDE, SIDE)
    assert torch.equal(measured(pixels), load_teacher(saved.path, num_labels=None)(pixels))
    with pytest.raises(ValueError, match=r"got a \w+ of masks.*as --teacher"):
        load_student(saved.path)
