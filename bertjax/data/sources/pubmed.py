"""PubMed's yearly baseline: titles, abstracts and MeSH headings from XML.

Format: https://www.nlm.nih.gov/bsd/licensee/elements_descriptions.html
"""

from collections.abc import Iterator, Mapping
from xml.etree import ElementTree

from bertjax.data.sources import base, files

_LICENCE = (
  "NLM: free with attribution; abstracts may be under publishers' copyright"
)


def _text(element: ElementTree.Element | None) -> str:
  """All text below an element: titles and abstracts hold <i>, <sup>..."""
  return (
    "" if element is None else " ".join("".join(element.itertext()).split())
  )


def read_pubmed(path: str, with_title: bool) -> Iterator[files.Record]:
  """Articles of one file that have an abstract, parsed as a stream."""
  with files.open_binary(path) as f:
    try:
      events = ElementTree.iterparse(f, events=("start", "end"))
      _, root = next(events)
      for event, element in events:
        if event != "end" or element.tag != "PubmedArticle":
          continue
        citation = element.find("MedlineCitation")
        if citation is None or citation.find("PMID") is None:
          raise ValueError(f"{path} has an article without a PMID.")
        pmid = _text(citation.find("PMID"))
        sections = [
          (part.get("Label", ""), _text(part))
          for part in citation.findall("Article/Abstract/AbstractText")
        ]
        abstract = [
          f"{label}: {text}" if label else text
          for label, text in sections
          if text
        ]
        if abstract:
          title = _text(citation.find("Article/ArticleTitle"))
          paragraphs = [title, *abstract] if with_title and title else abstract
          mesh = [
            _text(name)
            for name in citation.findall(
              "MeshHeadingList/MeshHeading/DescriptorName"
            )
          ]
          yield files.Record(
            pmid, "\n\n".join(paragraphs), {"title": title, "mesh": mesh}, pmid
          )
        root.clear()  # a file holds 30,000 articles; keep one
    except ElementTree.ParseError as err:
      raise ValueError(f"{path} is not well-formed XML: {err}.") from err


def pubmed_xml(
  paths,
  with_title: bool = True,
  fractions: Mapping[str, float] | None = None,
  licence: str = _LICENCE,
) -> base.Source:
  """`pubmed*.xml.gz`: a document is a title and the sections of its abstract.

  Examples also carry `title` and `mesh`, the descriptor names.

  Args:
    paths: patterns, or patterns by split.
    with_title: whether the title is the first paragraph of the text.
    fractions: share of each split, by hash of the text.
    licence: of the texts.
  """
  options = dict(with_title=with_title)
  return files.file_source(
    "pubmed_xml", paths, read_pubmed, options, fractions, licence
  )
