"""Checks the markdown pages of the repository: usage docs.py REPOSITORY. The last line is "N good, N bad"."""
import pathlib
import re
import subprocess
import sys

repo = pathlib.Path(sys.argv[1])
good, bad = 0, 0


def check(ok, text):
    global good, bad
    if ok:
        good += 1
    else:
        bad += 1
        print(f"note: {text}")


def pages():
    listed = subprocess.run(
        ["git", "-C", str(repo), "ls-files", "--cached", "--others", "--exclude-standard", "*.md"],
        capture_output=True, text=True, check=True,
    )
    return [repo / line for line in listed.stdout.splitlines() if (repo / line).exists()]


def anchor(heading):
    """The name that GitHub gives to a heading."""
    text = re.sub(r"[`*]|\[([^\]]*)\]\([^)]*\)", r"\1", heading.strip().lower())
    return re.sub(r"[^\w\- ]", "", text).replace(" ", "-")


def anchors(page):
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.S | re.M)
    return {anchor(h) for h in re.findall(r"^#+ (.*)$", text, flags=re.M)}


LINK = re.compile(r"(?<!!)\[[^\]\n]*\]\(([^)\s]+)(?: \"[^\"]*\")?\)|!\[[^\]]*\]\(([^)\s]+)\)")

for page in pages():
    name = page.relative_to(repo)
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.S | re.M)
    text = re.sub(r"`[^`\n]*`", "", text)
    for match in LINK.finditer(text):
        target = match.group(1) or match.group(2)
        if re.match(r"[a-z]+:", target):
            continue
        path, _, fragment = target.partition("#")
        found = (page.parent / path).resolve() if path else page
        if not found.exists():
            check(False, f"{name}: the link to {target} leads nowhere")
        elif fragment and found.suffix == ".md":
            check(fragment in anchors(found), f"{name}: {target} has no such heading")
        else:
            check(True, "")

readme = (repo / "conformance" / "README.md").read_text()
for suite in sorted((repo / "conformance" / "suites").glob("*.sh")):
    check(f"`{suite.stem}`" in readme, f"conformance/README.md does not describe the suite {suite.stem}")
    head = suite.read_text()
    check(re.search(r"^# about: .+$", head, flags=re.M) and re.search(r"^# budget: \d+$", head, flags=re.M),
          f"{suite.name} does not say what it is about and how long it may take")
    check(f"{suite.stem}" in (repo / "conformance" / "run").read_text(), f"conformance/run does not know {suite.stem}")

for name in ("DIFFERENCES.md", "PENDING.md"):
    page = repo / "conformance" / name
    check(page.exists(), f"conformance/{name} is missing")
    if not page.exists():
        continue
    table = False
    for number, line in enumerate(page.read_text().splitlines(), 1):
        if not line.startswith("|"):
            table = False
            continue
        cells = [c.strip() for c in re.split(r"(?<!\\)\|", line.strip().strip("|"))]
        if cells[0].lower() == "scenario":
            table = True
            continue
        if table and set(cells[0]) - set("-: "):
            check(len(cells) == 4 and all(cells), f"conformance/{name}:{number}: a row has four cells, none empty")

main = repo / "README.md"
if main.exists():
    check("conformance/run" in main.read_text(), "README.md does not name the command that runs the tests")

for script in [repo / "conformance" / "run", repo / ".ci" / "run", *sorted((repo / "conformance").rglob("*.sh"))]:
    done = subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True)
    check(done.returncode == 0, f"{script.relative_to(repo)}: {done.stderr.strip()}")

print(f"{good} good, {bad} bad")
