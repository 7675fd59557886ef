"The Russian introduction keeps step with the English home page: its numbers, its commands, its table, its links."
import re
from pathlib import Path

root = Path(__file__).resolve().parent.parent
ru, en = ((root/f).read_text(encoding='utf-8') for f in ('README.ru.md', 'README.md'))


def blocks(txt): return re.findall(r'```.*?\n(.*?)```', txt, re.S)


def commands(txt): return {re.sub(r'\s+#.*', '', l).strip() for b in blocks(txt) for l in b.splitlines()} - {''}


def numbers(txt):
    "Numbers of the text, with a point, without code, links and comments"
    txt = re.sub(r'```.*?```|`[^`]*`|\]\([^)]*\)|<!--.*?-->', ' ', txt, flags=re.S)
    return {float(n.replace(',', '.')) for n in re.findall(r'(?<![\w.])\.?\d+(?:[.,]\d+)?', txt)}


def rows(txt): return [l for l in txt.splitlines() if l.startswith('| ')]


def test_its_commands_are_commands_of_the_home_page():
    assert len(commands(ru))>8 and commands(ru)-commands(en)=={"pip install -c constraints.txt -e '.[instruct]'"}


def test_its_numbers_are_numbers_of_the_home_page():
    assert numbers(ru)-numbers(en)==set()
    headline = re.search(r'Answers became \*\*(.*?)\*\*', en)[1]
    assert numbers(headline)-{95.}<=numbers(re.search(r'короче на \*\*(.*?)\*\*', ru)[1])


def test_its_tables_say_what_those_of_the_home_page_say():
    shown = [r for r in rows(ru) if not r.startswith(('| инструкция', '| способ', '|---'))]
    assert len(shown)>=14 and [r for r in shown if r not in rows(en)]==[]


def test_its_links_lead_somewhere():
    found = re.findall(r'\]\(([^)#]+)\)', ru)
    assert len(found)>3 and [f for f in found if not f.startswith('http') and not (root/f).exists()]==[]
