"""Print requirements.lock from what is installed in .venv (`make lock`)."""

from importlib.metadata import distributions

HEAD = """\
# The versions that `make demo`, `make test` and CI install (pip reads this as constraints: it pins what is installed,
# and installs nothing by itself). Refresh with `make lock`. Some libraries have left Python 3.10 behind: there, pip
# picks their newest release that still runs on it."""

# Ours, pip's own, and the CUDA packages that some builds of torch bring and others do not.
LEFT_OUT = ("luthier", "pip", "setuptools", "wheel", "nvidia-", "cuda-", "triton")


def main() -> None:
    lines = []
    for found in distributions():
        name = found.metadata["Name"]
        if name.lower().startswith(LEFT_OUT):
            continue
        marker = ' ; python_version >= "3.11"' if "3.11" in (found.metadata.get("Requires-Python") or "") else ""
        lines.append(f"{name}=={found.version.split('+')[0]}{marker}")
    print(HEAD, *sorted(set(lines), key=str.lower), sep="\n")


if __name__ == "__main__":
    main()
