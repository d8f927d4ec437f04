"""Reading instruments' XML, whose namespaces change with their software."""

from __future__ import annotations

from collections.abc import Iterator
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

from storage_schemas.errors import InputError


class _Builder(ElementTree.TreeBuilder):
    """Refuses what no instrument writes: a DTD, whose entities may stand for other files, or for gigabytes."""

    def doctype(self, name: str, pubid: str | None, system: str | None) -> None:
        """Told before anything that the DTD declares."""
        raise ValueError(f"it has a DTD, {name!r}")


def parse_xml(name: str, data: bytes) -> Element:
    """The root of an XML file.

    Raises:
        InputError: naming the file, if it is not well-formed.
    """
    try:
        parser = ElementTree.XMLParser(target=_Builder())
        parser.feed(data)
        root: Element = parser.close()
        return root
    except (ElementTree.ParseError, LookupError, ValueError) as error:  # the last two of its encoding
        raise InputError(f"{name}: is not readable XML ({error}); without it names alone are read") from error


def local_name(tag: str) -> str:
    """A tag or attribute without its namespace."""
    return tag.rpartition("}")[2]


def local_attributes(element: Element) -> dict[str, str]:
    """An element's attributes, without namespaces."""
    return {local_name(name): value for name, value in element.attrib.items()}


def children(element: Element, name: str) -> Iterator[Element]:
    """The direct children of a name, in whatever namespace."""
    return (child for child in element if local_name(child.tag) == name)


def texts(element: Element) -> dict[str, str]:
    """Text of each direct child that has any, by name."""
    return {local_name(child.tag): child.text.strip() for child in element if child.text and child.text.strip()}
