import pytest

from musicgen_eval.models.checkpoint_files import CheckpointFiles
from musicgen_eval.models.embedders.licences import KNOWN, WeightsLicence, find_licence, licence_named

CARD = "---\nlanguage: en\nlicense: {}\n---\n\n# A model\n"


def find(folder, *, name="some/model", card=None, given=None) -> WeightsLicence:
    if card is not None:
        (folder / "README.md").write_text(card)
    return find_licence(CheckpointFiles(name, folder), given=given)


@pytest.mark.parametrize(
    ("name", "is_non_commercial"),
    [
        ("cc-by-nc-4.0", True),
        ("cc-by-nc-sa-4.0", True),
        ("CC BY-NC 4.0", True),
        ("custom non-commercial", True),
        ("cc-by-4.0", False),
        ("apache-2.0", False),
        ("mit", False),
        ("unknown", None),
    ],
)
def test_licences_that_forbid_commercial_use_are_detected(name, is_non_commercial):
    assert licence_named(name) == WeightsLicence(name, is_non_commercial)


def test_the_licence_is_read_from_the_model_card(tmp_path):
    assert find(tmp_path, card=CARD.format("cc-by-nc-4.0")) == WeightsLicence("cc-by-nc-4.0", True)


def test_the_users_licence_overrides_the_model_card_and_the_card_overrides_the_list(tmp_path):
    card = CARD.format("mit")
    assert find(tmp_path, name="laion/clap-htsat-unfused", card=card).name == "mit"
    assert find(tmp_path, card=card, given="cc-by-nc-4.0").name == "cc-by-nc-4.0"


@pytest.mark.parametrize(
    "card",
    [
        None,
        "# A model",
        "---\nlicense: [\n---\n",
        "---\nno mapping\n---\n",
        "---\nlanguage: en\n---\n",
        "---\nlicense: 3\n---\n",
    ],
)
def test_without_a_stated_licence_the_list_of_known_licences_is_used(tmp_path, card):
    assert find(tmp_path, card=card) == WeightsLicence("unknown", None)
    for name, licence in KNOWN.items():
        assert find(tmp_path, name=name, card=card).name == licence


def test_another_licence_is_named(tmp_path):
    assert find(tmp_path, card="---\nlicense: other\nlicense_name: My-NC\n---\n") == WeightsLicence("my-nc", True)


@pytest.mark.parametrize(
    "name", ["facebook/musicgen-small", "facebook/musicgen-stereo-large", "facebook/encodec_32khz"]
)
def test_weights_of_audiocraft_are_not_for_commercial_use(tmp_path, name):
    assert find(tmp_path, name=name) == WeightsLicence("cc-by-nc-4.0", True)
