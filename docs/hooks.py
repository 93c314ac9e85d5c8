"""Pages and pictures of the site whose files stand outside docs/, where GitHub looks for them."""

from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parent.parent
OUTSIDE = (
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "benchmarks/README.md",
    "benchmarks/results/study-compute.png",
    "benchmarks/results/study-macs.png",
    "benchmarks/results/study-rule.png",
    "benchmarks/results/training-step-cpu.png",
    "examples/validate.yml",
)


def on_files(files, config):
    for path in OUTSIDE:
        files.append(File.generated(config, path, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown, page, **_):
    """Rewrite links across the border of docs/, which does not exist on the site."""
    inside = page.file.src_uri not in OUTSIDE
    return markdown.replace("](../", "](") if inside else markdown.replace("](docs/", "](")
