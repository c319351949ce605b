import numpy as np
import pytest
import world


def test_the_same_seed_draws_the_same_videos() -> None:
    first, again = (world.videos_of(world.random_scenes((5,), 4, "train")) for _ in range(2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, world.videos_of(world.random_scenes((6,), 4, "train")))


def test_videos_are_float32_in_the_unit_range_at_any_size() -> None:
    scene = world.random_scenes((1,), 1, "train")[0]
    for frames, side in ((9, 48), (17, 64), (1, 32)):
        video = world.video_of(scene, frames=frames, side=side)
        assert video.shape == (frames, side, side, 3)
        assert video.dtype == np.float32
        assert video.min() >= 0
        assert video.max() <= 1


def test_shapes_are_anti_aliased() -> None:
    scene = world.random_scenes((2,), 1, "train")[0]
    assert len(np.unique(world.video_of(scene)[0, :, :, 0])) > 20


def test_the_world_is_as_rich_as_promised() -> None:
    assert len(world.SHAPES) >= 3
    assert len(world.COLOURS) >= 5
    assert len(world.MOTIONS) >= 6


def test_held_out_combinations_are_never_trained_on() -> None:
    train, held_out = set(world.combinations("train")), set(world.combinations("held-out"))
    assert not train & held_out
    assert len(train | held_out) == len(world.SHAPES) * len(world.COLOURS) * len(world.MOTIONS)
    assert {scene.combination for scene in world.random_scenes((3,), 400, "train")} <= train
    assert {scene.combination for scene in world.random_scenes((3,), 400, "held-out")} == held_out


@pytest.mark.parametrize("pair", [(0, 1), (0, 2), (1, 2)])
def test_training_sees_every_pair_of_attributes(pair: tuple[int, int]) -> None:
    pairs = {tuple(combination[i] for i in pair) for combination in world.combinations("train")}
    assert len(pairs) == len({p[0] for p in pairs}) * len({p[1] for p in pairs})


def test_shapes_stay_inside_the_frame() -> None:
    for scene in world.random_scenes((4,), 100, "train"):
        video = world.video_of(scene)
        chroma = video.max(axis=-1) - video.min(axis=-1)
        edges = np.concatenate([chroma[:, [0, -1]].ravel(), chroma[:, :, [0, -1]].ravel()])
        assert edges.max() < 1e-6, scene
