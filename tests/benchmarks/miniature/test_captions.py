import captions
import numpy as np
import world


def test_every_caption_says_its_scene() -> None:
    scenes = world.random_scenes((1,), 1000, "train")
    for scene, caption in zip(scenes, captions.captions_of(scenes, (2,)), strict=True):
        said = captions.meaning_of(caption)
        assert (said["shape"], said["colour"], said["motion"]) == scene.combination, caption


def test_captions_follow_their_seed() -> None:
    scenes = world.random_scenes((1,), 20, "train")
    assert captions.captions_of(scenes, (2,)) == captions.captions_of(scenes, (2,))
    assert captions.captions_of(scenes, (2,)) != captions.captions_of(scenes, (3,))


def test_one_scene_has_many_captions() -> None:
    scene = world.random_scenes((1,), 1, "train")[0]
    rng = np.random.default_rng(0)
    assert len({captions.caption_of(scene, rng) for _ in range(200)}) > 50


def test_the_example_of_the_readme_is_understood() -> None:
    said = captions.meaning_of("A red circle moves to the right")
    assert said == {"shape": "circle", "colour": "red", "motion": "right"}
