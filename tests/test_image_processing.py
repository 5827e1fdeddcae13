import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F
from transformers import AutoImageProcessor, SegformerImageProcessor, pipeline

from kd_trainer.models.image_processing import SmpImageProcessor, resize_image
from kd_trainer.models.modeling import SmpForSemanticSegmentation, SmpOutput

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)


def processor(side=32):
    return SmpImageProcessor(size={"height": side, "width": side}, image_mean=MEAN, image_std=STD)


def picture(height=48, width=80):
    generator = np.random.default_rng(3)
    coarse = generator.integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("student")
    model = SmpForSemanticSegmentation.create(
        encoder="mobilenet_v2",
        encoder_weights="none",
        id2label={0: "background", 1: "person"},
        image_size=64,
        decoder_channels=(16, 16, 8, 8, 8),
    )
    model.train()
    for _ in range(20):  # running statistics, so that the answers are not all one class
        model(torch.randn(2, 3, 64, 64))
    model.save_pretrained(path)
    SmpImageProcessor.from_model_config(model.config).save_pretrained(path)
    return path


def test_pixels_are_those_of_the_one_resize():
    """Training with other pixels than deployment costs accuracy that no metric here would show."""
    image = picture()
    expected = resize_image(torch.from_numpy(np.array(image)).permute(2, 0, 1), 32, 32)
    expected = expected.float().div(255).sub(torch.tensor(MEAN).view(3, 1, 1))
    expected = expected / torch.tensor(STD).view(3, 1, 1)
    values = processor()(image, return_tensors="pt")["pixel_values"]
    assert values.shape == (1, 3, 32, 32)
    torch.testing.assert_close(values[0], expected)


def test_resize_averages_when_it_shrinks():
    """Without antialiasing a fine pattern turns into stripes that depend on the size."""
    stripes = torch.zeros(3, 64, 64, dtype=torch.uint8)
    stripes[..., ::2] = 200
    small = resize_image(stripes, 16, 16)
    assert small.dtype == torch.uint8
    assert small[..., 2:-2].float().sub(100).abs().max() <= 2


def test_resize_of_a_batch_is_that_of_each_picture():
    """The data pipeline resizes one picture at a time, the processor a batch."""
    batch = torch.randint(0, 256, (2, 3, 40, 50), dtype=torch.uint8)
    together = resize_image(batch, 32, 48)
    assert all(
        torch.equal(resize_image(one, 32, 48), out)
        for one, out in zip(batch, together, strict=True)
    )
    assert resize_image(batch, 40, 50) is batch


def test_resize_refuses_other_types_and_empty_sizes():
    """Floats of 0..255 would be divided by 255, and those of 0..1 too."""
    with pytest.raises(TypeError, match=r"Expected a uint8 or float32 image, got torch\.int64"):
        resize_image(torch.zeros(3, 8, 8, dtype=torch.int64), 4, 4)
    with pytest.raises(TypeError, match=r"Expected a uint8 image, got torch\.float32"):
        SmpImageProcessor()(np.zeros((8, 8, 3), np.float32))
    with pytest.raises(ValueError, match="Expected a positive size, got 0x4"):
        resize_image(torch.zeros(3, 8, 8, dtype=torch.uint8), 0, 4)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "1", "LA"])
def test_every_usual_mode_becomes_rgb(mode):
    """A palette read as grey levels, or four channels, would be wrong or crash the first layer."""
    image = picture().convert(mode)
    values = processor()(image, return_tensors="pt")["pixel_values"]
    expected = processor()(image.convert("RGB"), return_tensors="pt")["pixel_values"]
    assert values.shape == (1, 3, 32, 32)
    torch.testing.assert_close(values, expected)


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_becomes_white(mode):
    """Hidden colours under transparent pixels would be segmented as if they were seen."""
    image = Image.new("RGBA", (32, 32), (255, 0, 0, 0)).convert(mode)
    values = processor()(image, do_normalize=False, return_tensors="pt")["pixel_values"]
    assert torch.equal(values, torch.ones(1, 3, 32, 32))


def test_pictures_of_sixteen_bits_are_refused():
    """PIL clips them to 255: an almost white picture without any error."""
    with pytest.raises(ValueError, match=r"8 bits a channel, got PIL mode 'I;16'"):
        processor()(Image.new("I;16", (32, 32)), return_tensors="pt")


def test_pictures_of_different_sizes_go_in_one_batch():
    """Users pass whole folders of photographs."""
    values = processor()([picture(48, 80), picture(64, 64)], return_tensors="pt")["pixel_values"]
    assert values.shape == (2, 3, 32, 32)
    alone = processor()(picture(64, 64), return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(values[1:], alone)


def test_processor_is_saved_and_found_by_the_auto_class(folder):
    """The Hub's widgets and pipelines look for preprocessor_config.json only."""
    assert (folder / "preprocessor_config.json").exists()
    loaded = AutoImageProcessor.from_pretrained(folder)
    assert type(loaded) is SmpImageProcessor
    assert dict(loaded.size) == {"height": 64, "width": 64}
    image = picture()
    first = loaded(image, return_tensors="pt")["pixel_values"]
    config = SmpForSemanticSegmentation.config_class.from_pretrained(folder)
    again = SmpImageProcessor.from_model_config(config)(image, return_tensors="pt")
    torch.testing.assert_close(first, again["pixel_values"])


def test_maps_have_the_original_size():
    """Masks of the network's size would not lie on the photograph."""
    logits = torch.randn(2, 3, 8, 8)
    maps = processor().post_process_semantic_segmentation(
        SmpOutput(logits=logits), target_sizes=[(20, 30), (8, 8)]
    )
    assert [tuple(m.shape) for m in maps] == [(20, 30), (8, 8)]
    assert torch.equal(maps[1], logits[1].argmax(0))
    kept = processor().post_process_semantic_segmentation(SmpOutput(logits=logits))
    assert torch.equal(torch.stack(kept), logits.argmax(1))
    with pytest.raises(ValueError, match="Expected 2 target sizes, got 1"):
        processor().post_process_semantic_segmentation(
            SmpOutput(logits=logits), target_sizes=[(8, 8)]
        )


def test_stock_pipeline_gives_the_masks_of_the_raw_logit(folder):
    """With one channel the stock argmax would make every pixel background, without an error."""
    image = picture(96, 80)
    results = pipeline("image-segmentation", model=str(folder))(image)
    masks = {result["label"]: np.array(result["mask"]) > 0 for result in results}
    model = SmpForSemanticSegmentation.from_pretrained(folder).eval()
    batch = AutoImageProcessor.from_pretrained(folder)(image, return_tensors="pt")
    with torch.no_grad():
        raw = model(**batch).raw_logits
    raw = F.interpolate(raw, (96, 80), mode="bilinear", align_corners=False)
    expected = (raw.sigmoid() > 0.5)[0, 0].numpy()
    assert set(masks) == {"background", "person"}
    assert 0.01 < expected.mean() < 0.99
    assert (masks["person"] == expected).mean() > 0.9999
    assert (masks["background"] == ~masks["person"]).all()


def test_stock_processor_gives_the_same_maps(folder):
    """Users may feed the output to the processor of any other segmentation model."""
    model = SmpForSemanticSegmentation.from_pretrained(folder)
    with torch.no_grad():
        output = model(torch.randn(1, 3, 64, 64))
    sizes = [(50, 70)]
    ours = processor().post_process_semantic_segmentation(output, target_sizes=sizes)
    stock = SegformerImageProcessor().post_process_semantic_segmentation(output, sizes)
    assert torch.equal(ours[0], stock[0])
