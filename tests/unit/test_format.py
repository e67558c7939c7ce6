"""docs/FORMAT.md against the code: every table stands in it word for word, and every struct has its table's size."""

import re
from pathlib import Path

import pytest

from store import format as layout
from store.keyring import layout as format_keys

FORMAT = (Path(__file__).parents[2] / "docs" / "FORMAT.md").read_text()
TABLE = re.compile(r"^[A-Z][A-Z ]+(?: .*)?\n(?:    .*\n)+", re.MULTILINE)


def tables(module) -> list[str]:
    found = [match[0].rstrip() for match in TABLE.finditer(module.__doc__)]
    assert "offset size  field" in found[0]
    assert found
    return found


@pytest.mark.parametrize("table", [*tables(layout), *tables(format_keys)], ids=lambda table: table.split(" ")[0])
def test_table_is_in_the_document(table):
    for line in table.splitlines():
        assert line in FORMAT, f"docs/FORMAT.md lacks: {line}"


def fixed_size(title: str) -> int:
    """Where the first field of variable length or place begins."""
    table = next(each for each in tables(layout) if each.startswith(title))
    end = 0
    for line in table.splitlines()[2:]:
        offset, size = line.split()[:2]
        if not (offset.isdigit() and size.isdigit()):
            return int(offset) if offset.isdigit() else end
        end = int(offset) + int(size)
    return end


@pytest.mark.parametrize(
    ("title", "struct"),
    [
        ("REPOSITORY", layout.CONFIG),
        ("PACK", layout.PACK_HEADER),
        ("FRAME", layout.FRAME_HEADER),
        ("FOOTER", layout.FOOTER_HEADER),
        ("RECORD", layout.RECORD_HEADER),
    ],
)
def test_struct_has_the_size_of_its_table(title, struct):
    assert struct.size == fixed_size(title)
    assert struct.format.startswith("<")


def test_versions_come_first():
    from base.errors import FormatVersionError

    for decode in (layout.decode_config, layout.decode_pack_header, layout.decode_record):
        magic = {
            layout.decode_config: layout.CONFIG_MAGIC,
            layout.decode_pack_header: layout.PACK_MAGIC,
            layout.decode_record: layout.RECORD_MAGIC,
        }[decode]
        with pytest.raises(FormatVersionError, match="upgrade Perdure"):
            decode(magic + (layout.VERSION + 1).to_bytes(2, "little"), "an object")
