"""Sizes in bytes are written and read as people do."""

import pytest

from modeling_ivtp.files.sizes import byte_count, human_bytes


def test_bytes_in_words():
    assert [human_bytes(count) for count in (0, 999, 1000, 999_499, 999_500, 13_500_000_000, 2 * 10**15)] == [
        "0 bytes",
        "999 bytes",
        "1 KB",
        "999 KB",
        "1 MB",
        "13.5 GB",
        "2e+03 TB",
    ]


def test_words_in_bytes():
    assert [byte_count(size, "size") for size in ("5GB", "1.5 kb", " 300MB ", "2TB", 7)] == [
        5 * 10**9,
        1500,
        3 * 10**8,
        2 * 10**12,
        7,
    ]


@pytest.mark.slow
@pytest.mark.parametrize("size", ["lots", "", "0", "0GB", "0.0001KB", "-1GB", "5", "5GiB", "1e3MB", 0, -1])
def test_what_is_no_size_is_refused_by_name(size):
    with pytest.raises(ValueError, match=r"shard=.*allowed: a number above zero with KB, MB, GB or TB, such as 5GB"):
        byte_count(size, "shard")
