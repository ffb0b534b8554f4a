"""Describe pictures with a base model, or with a base model and your adapter.

python examples/describe_image.py cat.jpg dog.png
python examples/describe_image.py --adapter runs/pokemon-cards card.png
python examples/describe_image.py --base tiny drawing.png       # the embedded model
"""

from __future__ import annotations

import argparse

import idefics_qlora as iq


def main(arguments: list[str] | None = None) -> list[str]:
    """Print one text per picture, and return them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("images", nargs="+", help="files or http(s) URLs")
    parser.add_argument(
        "--base",
        help="Hub id, folder, or 'tiny'; left out: the adapter's, or idefics-9b without one",
    )
    parser.add_argument("--adapter", help="a run's folder, or a checkpoint-N of it")
    parser.add_argument("--question", help="text behind the picture; left out: as in training")
    parser.add_argument("--max_new_tokens", "--max-new-tokens", type=int, default=50)
    options = parser.parse_args(arguments)

    base = str(iq.tiny.BASE) if options.base == "tiny" else options.base
    images = [iq.images.open_image(source) for source in options.images]
    if options.adapter:
        model, processor = iq.load_finetuned(options.adapter, base=base)
    else:
        model, processor = iq.load_model(base or "HuggingFaceM4/idefics-9b")
    asked = [
        [image, options.question] if options.question else {"image": image} for image in images
    ]
    texts = iq.generate(model, processor, asked, max_new_tokens=options.max_new_tokens)
    for source, text in zip(options.images, texts, strict=True):
        print(f"{source}: {text.strip()}")
    return texts


if __name__ == "__main__":
    main()
