"""What a VideoJob says once it is read."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from api_cases import ABSENT, AS_SCENES, MINIMAL, REVISION, document
from videojob_api import validation
from videojob_api.spec import S3Location, Spec, VideoJob


def read(changes: dict | None = None) -> VideoJob:
    return validation.read(document(changes))


def spec(changes: dict | None = None) -> Spec:
    return read(changes).spec


def test_a_minimal_document_gets_these_defaults():
    assert read().document()["spec"] == MINIMAL["spec"] | {
        "negativePrompt": "",
        "video": {"frames": 81, "width": 832, "height": 480, "fps": 16},
        "sampling": {"seed": 0},
        "dualParallel": {"blockLatents": 8, "contextLatents": 8},
        "checkpoint": {"everySeconds": 60},
        "nodes": 1,
        "gpusPerNode": 8,
        "resources": {},
        "output": {"s3": {"bucket": "videos", "prefix": "", "region": "us-east-1", "addressingStyle": "auto"}},
    }


@pytest.mark.parametrize(
    ("nodes", "gpus", "ranks_per_node", "ranks", "world_size"),
    [(1, 8, ABSENT, 8, 8), (3, 8, ABSENT, 8, 24), (1, 0, ABSENT, 1, 1), (2, 0, 4, 4, 8), (64, 16, ABSENT, 16, 1024)],
)
def test_there_is_a_rank_for_each_gpu_or_as_many_as_asked_for_on_cpus(nodes, gpus, ranks_per_node, ranks, world_size):
    changes = {"spec.nodes": nodes, "spec.gpusPerNode": gpus, "spec.ranksPerNode": ranks_per_node}
    counted = spec({path: value for path, value in changes.items() if value is not ABSENT})
    assert (counted.ranks, counted.world_size) == (ranks, world_size)


def test_a_prompt_is_one_scene_of_the_whole_length():
    (scene,) = spec().all_scenes
    assert (scene.prompt, scene.frames, spec().frames) == ("A fox", 81, 81)


def test_the_length_is_the_sum_of_the_scenes():
    assert [scene.prompt for scene in spec(AS_SCENES).all_scenes] == ["A fox", "A hare"]
    assert spec(AS_SCENES).frames == 100


@pytest.mark.parametrize(
    "changes",
    [
        {"spec.checkpoint.everySeconds": 5},
        {"spec.nodes": 2},
        {"spec.gpusPerNode": 4},
        {"spec.gpusPerNode": 0, "spec.ranksPerNode": 4},
        {"spec.resources.memory": "64Gi"},
        {"spec.output.s3": {"bucket": "elsewhere", "prefix": "p", "endpoint": "http://s3"}},
        {"metadata.name": "other", "metadata.namespace": "other", "metadata.uid": "u-2"},
        {"spec.sampling.steps": None, "spec.sampling.seed": 0.0, "spec.video.fps": 16.0},
    ],
    ids=str,
)
def test_the_same_render_elsewhere_has_the_same_digest(changes):
    assert spec(changes).digest() == spec().digest()


RENDERS = [
    {},
    AS_SCENES,
    AS_SCENES | {"spec.scenes": [{"prompt": "A hare", "frames": 60}, {"prompt": "A fox", "frames": 40}]},
    AS_SCENES | {"spec.scenes": [{"prompt": "A fox", "frames": 60}, {"prompt": "A hare", "frames": 40}]},
    {"spec.prompt": "A fox "},
    {"spec.negativePrompt": "blur"},
    {"spec.video.frames": 82},
    {"spec.video.width": 848},
    {"spec.video.height": 496},
    {"spec.video.fps": 17},
    {"spec.model.source.localPath": "/models/other"},
    {"spec.model.source": {"huggingFace": {"repository": "a/b", "revision": REVISION}}},
    {"spec.model.source": {"huggingFace": {"repository": "a/b", "revision": REVISION[::-1]}}},
    {"spec.sampling.steps": 51},
    {"spec.sampling.steps": 50},
    {"spec.sampling.guidanceScale": 5.5},
    {"spec.sampling.guidanceScale2": 5.5},
    {"spec.sampling.flowShift": 3},
    {"spec.sampling.seed": 1},
    {"spec.dualParallel.blockLatents": 9},
    {"spec.dualParallel.contextLatents": 7},
]


def test_renders_that_differ_in_anything_seen_differ_in_their_digests():
    assert len({spec(changes).digest() for changes in RENDERS}) == len(RENDERS)


@pytest.mark.parametrize(
    ("fields", "url"),
    [
        ({"prefix": "a/b"}, "https://videos.s3.us-east-1.amazonaws.com/a/b/index.m3u8"),
        ({}, "https://videos.s3.us-east-1.amazonaws.com/index.m3u8"),
        ({"region": "eu-west-1"}, "https://videos.s3.eu-west-1.amazonaws.com/index.m3u8"),
        ({"addressing_style": "path"}, "https://s3.us-east-1.amazonaws.com/videos/index.m3u8"),
        ({"bucket": "my.videos"}, "https://s3.us-east-1.amazonaws.com/my.videos/index.m3u8"),
        ({"endpoint": "http://s3:7070", "prefix": "a"}, "http://s3:7070/videos/a/index.m3u8"),
        ({"endpoint": "http://s3:7070/"}, "http://s3:7070/videos/index.m3u8"),
        ({"endpoint": "http://gate/s3/", "prefix": "a"}, "http://gate/s3/videos/a/index.m3u8"),
        ({"endpoint": "https://s3.example", "addressing_style": "virtual"}, "https://videos.s3.example/index.m3u8"),
        (
            {"endpoint": "https://gate/s3/", "addressing_style": "virtual"},
            "https://videos.gate/s3/index.m3u8",
        ),
        ({"endpoint": "http://[no-address"}, "http://[no-address/videos/index.m3u8"),
        ({"prefix": "a?b/#c/%41"}, "https://videos.s3.us-east-1.amazonaws.com/a%3Fb/%23c/%2541/index.m3u8"),
        ({"prefix": "füchse"}, "https://videos.s3.us-east-1.amazonaws.com/f%C3%BCchse/index.m3u8"),
    ],
)
def test_an_object_is_fetched_from(fields, url):
    assert S3Location(**{"bucket": "videos", **fields}).url("index.m3u8") == url


@pytest.mark.parametrize(("prefix", "key"), [("", "index.m3u8"), ("a/b", "a/b/index.m3u8")])
def test_a_key_begins_with_the_prefix_where_there_is_one(prefix, key):
    assert S3Location(bucket="videos", prefix=prefix).key("index.m3u8") == key


PROMPTS = [
    "'single', \"double\", ''' and \\ \\n",
    "two\nlines\r\n\tand a tab\n",
    "👩‍👩‍👧 🦊 狐狸 ünïcödé \u2028 \u00a0",
    "$(HOME) ${HOME} $$(X) `id` {{ .Values.x }} %s {0}",
    " leading and trailing ",
    "---\n- yes: [1, {",
    "</script>\x00\x7f",
    ("A fox walks, " * 1000)[:10_000],
]


@pytest.mark.parametrize("prompt", PROMPTS, ids=ascii)
def test_a_prompt_reaches_the_worker_unchanged(prompt):
    sent = json.dumps(read({"spec.prompt": prompt, "spec.negativePrompt": prompt}).document())
    received = validation.read(json.loads(sent)).spec
    assert (received.prompt, received.negative_prompt) == (prompt, prompt)


@given(st.text(min_size=1))
def test_any_text_reaches_the_worker_unchanged(prompt):
    sent = json.dumps(read({"spec.prompt": prompt}).document())
    assert validation.read(json.loads(sent)).spec.prompt == prompt


def test_the_workers_document_is_read_as_the_same_videojob():
    videojob = read(AS_SCENES | {"spec.sampling.flowShift": 3, "metadata.uid": "u-1", "metadata.generation": 2})
    assert validation.read(videojob.document()) == videojob
