from __future__ import annotations

import pickle
import string

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from storage_schemas.errors import InputError
from storage_schemas.keys import SiteKey, TrackKey, WellKey, canonical_well, check_name, split_well

ALNUM = string.ascii_letters + string.digits
# Written out from the documented rule: letters, digits, blanks and . _ + = @ ( ) -, and not at the ends what is barred.
names = st.builds(
    lambda first, middle, last: first + middle + last,
    st.sampled_from(ALNUM),
    st.text(ALNUM + " ._+=@()-", max_size=20),
    st.sampled_from(ALNUM + "_+=@()-"),
).filter(lambda name: ".." not in name)
wells = st.builds(
    lambda row, column: f"{row}{column:02d}",
    st.text(string.ascii_uppercase, min_size=1, max_size=2),
    st.integers(1, 999),
)
well_keys = st.builds(WellKey, names, wells)
site_keys = st.builds(SiteKey, names, wells, names)
track_keys = st.builds(TrackKey, names, wells, names, st.integers(1, 10**18 - 1))

HOSTILE = [
    "",
    ".",
    "..",
    "../x",
    "x/..",
    "x..y",
    "a/b",
    "/etc",
    "a\\b",
    "~",
    ".hidden",
    "-rf",
    " x",
    "x ",
    "x.",
    "x\n",
    "\nx",
    "x\0",
    "x\ty",
    "x\x7f",
    "x\u202ey",
    "e\u0301",
    "é",
    "x*",
    "x?",
    "x#y",
    "x%2e",
    "x:y",
    "<b>",
    "x&y",
    "$x",
    "`x`",
    "x;y",
    "x|y",
    "x'y",
    'x"y',
    "{x}",
    "[x]",
    "x" * 129,
]


@given(well_keys, site_keys, track_keys)
def test_text_form_reads_back_as_the_same_key(well: WellKey, site: SiteKey, track: TrackKey) -> None:
    assert WellKey.parse(str(well)) == well
    assert SiteKey.parse(str(site)) == site
    assert TrackKey.parse(str(track)) == track


@given(track_keys)
def test_text_form_is_its_parts_joined_by_slashes(key: TrackKey) -> None:
    assert str(key).split("/") == [key.plate, key.well, key.site, str(key.track)]
    assert pickle.loads(pickle.dumps(key)) == key


@given(st.lists(well_keys, unique=True))
def test_different_keys_have_different_text_forms(keys: list[WellKey]) -> None:
    assert len({str(key) for key in keys}) == len(keys)


@given(names)
def test_usable_names_come_back_unchanged(name: str) -> None:
    assert check_name(name, "plate") == name


@pytest.mark.parametrize("name", HOSTILE, ids=ascii)
def test_hostile_names_are_refused_everywhere(name: str) -> None:
    with pytest.raises(InputError, match=r"plate name .* is not usable"):
        check_name(name, "plate")
    with pytest.raises(InputError):
        WellKey(name, "B02")
    with pytest.raises(InputError):
        SiteKey("p", "B02", name)
    with pytest.raises(InputError):
        TrackKey("p", "B02", name, 1)
    with pytest.raises(InputError):
        SiteKey.parse(f"p/B02/{name}")


@given(st.text(max_size=30))
def test_an_accepted_name_is_one_harmless_part_of_a_path(name: str) -> None:
    try:
        check_name(name, "site")
    except InputError:
        return
    assert name
    assert name.isascii()
    assert name.isprintable()
    assert name[0] in ALNUM
    assert ".." not in name
    assert not set(name) & set("/\\:*?\"'<>|$`;&#%~{}[]")


@given(wells)
def test_canonical_wells_stay_and_their_parts_rejoin(well: str) -> None:
    assert canonical_well(well) == well
    assert "".join(split_well(well)) == well


@pytest.mark.parametrize(
    ("spelt", "canonical"),
    [("b2", "B02"), (" B02 ", "B02"), ("B002", "B02"), ("p24", "P24"), ("AF48", "AF48"), ("a100", "A100")],
)
def test_spellings_of_a_well_become_one(spelt: str, canonical: str) -> None:
    assert canonical_well(spelt) == canonical


@pytest.mark.parametrize(
    "well", ["", "B", "02", "2B", "B0", "B00", "B-1", "B 2", "B0x2", "ABC01", "B0001", "B/02", "B²"]
)
def test_what_is_no_well_is_refused(well: str) -> None:
    with pytest.raises(InputError, match="well"):
        canonical_well(well)


@given(st.text(max_size=6))
def test_canonical_well_refuses_or_gives_a_form_that_stays(text: str) -> None:
    try:
        well = canonical_well(text)
    except InputError:
        return
    assert well.isascii()
    assert canonical_well(well) == well
    assert WellKey("p", well).well == well


@pytest.mark.parametrize("well", ["b02", "B2", "B002", " B02"])
def test_a_key_takes_only_the_canonical_spelling(well: str) -> None:
    with pytest.raises(InputError, match="B02"):
        WellKey("p", well)


@given(st.text(max_size=40))
def test_parse_refuses_or_reads_exactly_the_text_form(text: str) -> None:
    for kind in (WellKey, SiteKey, TrackKey):
        try:
            key = kind.parse(text)
        except InputError:
            continue
        assert str(key) == text


@given(track_keys, st.sampled_from(["0", "-1", "01", "+1", "1.0", "", "1 ", "one", "\u0661", "9" * 19]))
def test_tracks_are_whole_numbers_from_one(key: TrackKey, number: str) -> None:
    with pytest.raises(InputError):
        TrackKey.parse(f"{key.plate}/{key.well}/{key.site}/{number}")


@pytest.mark.parametrize("track", [0, -1])
def test_a_track_key_counts_from_one(track: int) -> None:
    with pytest.raises(InputError, match="counted from 1"):
        TrackKey("p", "B02", "0", track)


@given(track_keys)
def test_a_key_of_another_length_is_refused(key: TrackKey) -> None:
    assume("/" not in key.site)
    with pytest.raises(InputError, match="plate/well"):
        WellKey.parse(str(key))
    with pytest.raises(InputError, match="plate/well/site/track"):
        TrackKey.parse(f"{key.plate}/{key.well}")


def test_keys_sort_by_plate_then_well_then_site_then_track() -> None:
    keys = [TrackKey("p", "A01", "0", 10), TrackKey("p", "A01", "0", 9), TrackKey("a", "B01", "0", 1)]
    assert sorted(keys) == [keys[2], keys[1], keys[0]]
