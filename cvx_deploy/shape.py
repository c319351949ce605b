"""The size of a video."""

from dataclasses import dataclass

from cvx_deploy.bounds import check_video


@dataclass(frozen=True)
class Shape:
    """One video's size: frames, and height and width in pixels."""

    frames: int
    height: int
    width: int

    def __str__(self) -> str:
        return f"{self.frames}x{self.height}x{self.width}"

    @classmethod
    def parse(cls, text: str) -> "Shape":
        """Read what `str` writes, such as ``49x480x720``; raise ValueError on anything else."""
        frames, height, width = (int(number) if number.isdecimal() else 0 for number in text.split("x"))
        if min(frames, height, width) < 1:
            raise ValueError(f"{text!r} is not a shape")
        check_video(frames, height, width)
        return cls(frames, height, width)
