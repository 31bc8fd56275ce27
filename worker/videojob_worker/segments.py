"""Makes video files of frames: one fragmented-MP4 segment a block, the HLS playlist, the whole video.

``publisher`` brings the frames from ``decoder`` and the bytes to ``store``. Knows neither torch nor storage nor blocks
of latents.

Every segment has an encoder of its own, so it is complete as soon as its block is, a new attempt needs no encoder
state, and the same frames give the same bytes; only the position in time ties it to its neighbours.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import cast

import av
import numpy as np
from av.container import OutputContainer
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc, Interpolation
from av.video.stream import VideoStream
from numpy.typing import NDArray

from videojob_api import names

from .errors import RenderError

Frames = NDArray[np.uint8]  # (frames, H, W, 3), RGB

# One fragment a segment; times count from the video's begin, not the segment's; nothing trails the last fragment.
_FRAGMENTED = {
    "movflags": "empty_moov+default_base_moof+frag_custom+frag_discont+negative_cts_offsets+cmaf+skip_trailer",
    "use_editlist": "0",
    "avoid_negative_ts": "disabled",
    "fflags": "+bitexact",  # no library versions in the bytes
}
_TICKS_PER_FRAME = 1000
_SCALING = (
    Interpolation.BICUBIC | Interpolation.FULL_CHR_H_INP | Interpolation.ACCURATE_RND | Interpolation.BITEXACT
)  # the same bytes on every CPU


@dataclass(frozen=True)
class H264:
    """How frames are compressed: H.264 in 4:2:0, BT.709, which everything plays.

    A change changes every byte: a new attempt under changed settings replaces what an older one wrote.
    """

    crf: int = 18
    """Constant quality, lower is better and larger; 18 is visually lossless, about 2 bits for 10 pixels."""
    preset: str = "medium"
    """x264's speed; medium encodes 832x480 at about 70 frames a second on 2 cores, far above what renders."""
    keyframe_every: int = 250
    """At most this many frames between places to seek to; each segment begins with one anyhow."""
    threads: int = 4
    """Pinned, because x264's output depends on it."""

    encoder = "libx264"

    @property
    def options(self) -> dict[str, str]:
        """x264's options. No B-frames: presentation begins at the first frame, without an edit list."""
        return {
            "crf": str(self.crf),
            "preset": self.preset,
            "bf": "0",
            "g": str(self.keyframe_every),
            "x264-params": "cpu-independent=1",
        }


DEFAULT = H264()


@dataclass(frozen=True)
class Segment:
    """A block of the video as a file: ``init + media`` plays alone, ``init`` and the media in a row play as a whole."""

    index: int
    first_frame: int
    frames: int
    fps: int
    init: bytes  # ftyp and moov: the same for all segments of a video
    media: bytes  # moof and mdat

    @property
    def duration_s(self) -> float:
        """How long it plays."""
        return self.frames / self.fps


def sha256(body: bytes) -> str:
    """A file's digest, in hexadecimal."""
    return hashlib.sha256(body).hexdigest()


def encode(chunks: Iterable[Frames], *, index: int, first_frame: int, fps: int, codec: H264 = DEFAULT) -> Segment:
    """Encode one block.

    Args:
        chunks: the block's frames in order, some (f, H, W, 3) at a time; H and W are even.
        index: the block's.
        first_frame: the block's first frame, counted from the video's begin.
        fps: frames per second.
        codec: how to compress.

    Raises:
        ValueError: there is no frame.
        RenderError: the encoder refuses.
    """
    sink = io.BytesIO()
    options = _FRAGMENTED | {
        "video_track_timescale": str(fps * _TICKS_PER_FRAME),
        "fragment_index": str(index + 1),
    }
    count = 0
    try:
        with av.open(sink, "w", format="mp4", options=options) as container:
            stream = None
            for image in (image for chunk in chunks for image in chunk):
                stream = stream or _add_stream(container, image, fps, codec)
                container.mux(stream.encode(_picture(image, first_frame + count, fps)))
                count += 1
            if stream is None:
                raise ValueError(f"segment {index} has no frames")
            container.mux(stream.encode())
    except av.FFmpegError as error:
        raise RenderError(f"segment {index} cannot be encoded with {codec}: {error}") from error
    written = sink.getvalue()
    cut = _begin_of_media(written)
    return Segment(index, first_frame, count, fps, init=written[:cut], media=written[cut:])


def init(width: int, height: int, fps: int, codec: H264 = DEFAULT) -> bytes:
    """The init segment of every segment of such a video."""
    black = np.zeros((1, height, width, 3), np.uint8)
    return encode([black], index=0, first_frame=0, fps=fps, codec=codec).init


def _add_stream(container: OutputContainer, image: Frames, fps: int, codec: H264) -> VideoStream:
    stream = cast(VideoStream, container.add_stream(codec.encoder, rate=fps, options=codec.options))
    stream.height, stream.width, _ = image.shape
    stream.pix_fmt = "yuv420p"
    context = stream.codec_context
    context.thread_count = codec.threads
    context.color_range = ColorRange.MPEG
    context.colorspace = Colorspace.ITU709
    context.color_primaries = ColorPrimaries.BT709
    context.color_trc = ColorTrc.BT709
    return stream


def _picture(image: Frames, number: int, fps: int) -> av.VideoFrame:
    picture = av.VideoFrame.from_ndarray(image, format="rgb24").reformat(
        format="yuv420p",
        src_color_range=ColorRange.JPEG,
        dst_color_range=ColorRange.MPEG,
        dst_colorspace=Colorspace.ITU709,
        dst_color_primaries=ColorPrimaries.BT709,
        dst_color_trc=ColorTrc.BT709,
        interpolation=_SCALING,
        threads=1,
    )
    picture.pts, picture.time_base = number, Fraction(1, fps)
    return picture


def _begin_of_media(file: bytes) -> int:
    """Where the first moof box begins; a box is a 4-byte length, a 4-byte type, the rest."""
    at = 0
    while file[at + 4 : at + 8] != b"moof":
        length = int.from_bytes(file[at : at + 4], "big")
        if length < 8 or at + length >= len(file):
            raise RenderError("the muxer wrote no fragment; does this FFmpeg support frag_custom?")
        at += length
    return at


def playlist(frames: Sequence[int], fps: int, *, longest: int, ended: bool, note: str = "") -> str:
    """The HLS playlist of the first ``len(frames)`` segments (RFC 8216, version 7, fragmented MP4).

    A player may join at any time, begins at the begin, and may seek back; lists only grow from call to call.

    Args:
        frames: frames of each segment that is in storage, from the first.
        fps: frames per second.
        longest: frames of the longest segment of the whole video, so that the target duration never changes.
        ended: whether these are all segments.
        note: a line for people and for telling two writers' lists apart.
    """
    head = [
        "#EXTM3U",
        *([f"# {note}"] if note else []),
        "#EXT-X-VERSION:7",
        "#EXT-X-PLAYLIST-TYPE:EVENT",
        f"#EXT-X-TARGETDURATION:{-(-longest // fps)}",
        "#EXT-X-MEDIA-SEQUENCE:0",
        "#EXT-X-INDEPENDENT-SEGMENTS",
        "#EXT-X-START:TIME-OFFSET=0,PRECISE=YES",
        f'#EXT-X-MAP:URI="{names.INIT_SEGMENT}"',
    ]
    body = [f"#EXTINF:{count / fps:.6f},\n{names.segment(index)}" for index, count in enumerate(frames)]
    return "\n".join([*head, *body, *(["#EXT-X-ENDLIST"] if ended else [])]) + "\n"


def listed(text: str) -> tuple[int, bool]:
    """How many segments a playlist made by ``playlist`` names, and whether it has ended."""
    lines = text.splitlines()
    return sum(line.startswith("#EXTINF:") for line in lines), "#EXT-X-ENDLIST" in lines


def remux(fragmented: Path, video: Path) -> int:
    """Make one progressive MP4 with its index in front out of ``init`` and all media in a row, without re-encoding.

    Args:
        fragmented: the init segment and every segment's media in one file.
        video: written, or overwritten.

    Returns:
        The number of frames.

    Raises:
        RenderError: the file is broken.
    """
    count = 0
    try:
        with (
            av.open(str(fragmented)) as source,
            av.open(str(video), "w", format="mp4", options={"movflags": "faststart", "fflags": "+bitexact"}) as target,
        ):
            stream = target.add_stream_from_template(source.streams.video[0])
            for packet in source.demux(video=0):
                if packet.dts is None:  # the end
                    continue
                packet.stream = stream
                target.mux(packet)
                count += 1
    except av.FFmpegError as error:
        raise RenderError(f"the segments in {fragmented} cannot be joined: {error}") from error
    return count
