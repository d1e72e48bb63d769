"""Detection: which form a data set has where its recipe leaves that open, by its first record, and what is refused then.

A set that says of some answers that they are bad, or holds a text that the form has a place for under another name, is refused
with what to set: to learn the next token from all of it, or to leave something out in silence, would be wrong. Knows records
and forms; must not know a tokenizer or a template.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from qlora.data.formats import FORMS, JUDGED, Fields, turns_of
from qlora.data.sources import Record
from qlora.data.suggestions import OTHERS, SURE_LABELS, columns_of, guess, reads, rivals, suggested
from qlora.data.turns import LIKE_A_LABEL, filled, is_spoken, may_decide, read_turn, spoken_in
from qlora.data.values import capital, verdict
from qlora.errors import DataError, listed

_DOCUMENTS = ("documents", "contexts", "passages", "chunks", "context")


def detect_form(fields: Fields) -> str | None:
    """The first form whose fields are all there, in the order of ``FORMS``; None when none is.

    One whose turns are no list is named only when no form matches, so that it can be said what is wrong.
    """
    there = [name for name, form in FORMS.items() if name != "kto" and fields.keys() >= set(form.needs)]
    return next((name for name in there if FORMS[name].matches(fields)), there[0] if there else None)


def form_of_pairs(record: Record, form: str) -> str:
    """The form of pairs, where the recipe's is that or left open, and the first record has both answers. Raises DataError."""
    fields = record.fields
    if form not in ("auto", "preference"):
        raise DataError(
            f"data.form is {form}, and the objective compares a chosen answer with a rejected one; leave data.form out, or set "
            "objective.name=tokens to learn from single answers."
        )
    if record.fault is None and form == "auto" and not (fields.keys() >= {"chosen", "rejected"}):
        name, theirs = suggested(fields, FORMS) or ("", {})
        several, _ = rivals(fields)
        do = "Give records with a 'chosen' and a 'rejected' answer"
        if name == "preference":
            do = f"Set {columns_of(theirs)} to read it so"
        elif several:
            do = f"Write the better one of {listed(several)} as 'chosen' and another as 'rejected'"
        raise DataError(
            f"{capital(record.place)} has the fields {listed(fields, 12) or '(none)'}; the objective compares answers, and expected "
            f"'chosen' and 'rejected' among them. {do}, or set objective.name=tokens to learn from single answers."
        )
    return "preference"


def found_form(records: Sequence[Record]) -> str:
    """The form of the first record. A preference set is refused, as to learn the next token from all of it would be wrong."""
    first = records[0]
    plain = detect_form({name: value for name, value in first.fields.items() if name not in ("chosen", "rejected")})
    if pairs := next((one for one in records if filled(one.fields.get("chosen")) and "rejected" in one.fields), None):
        other = f", or data.form={plain} to read the records as {plain} and leave both aside" if plain else ""
        name, theirs = suggested(pairs.fields, FORMS) or ("", {})
        asked = "instruction" in pairs.fields or name != "preference"
        columns = "" if asked or not columns_of(theirs) else f" and {columns_of(theirs)}"
        raise DataError(
            f"{capital(pairs.place)} has the form preference, an answer that was chosen and one that was rejected. Set "
            f"objective.name=dpo{columns} to learn from both, or data.form=preference{columns} to train the chosen answers alone{other}."
        )
    if plain in JUDGED:
        _require_desired(records, plain)
    tree = next((name for name, value in first.fields.items() if isinstance(value, dict) and is_spoken(value)), None)
    if plain is None and tree:
        raise DataError(
            f"{capital(first.place)} has one turn of a conversation in its field {tree}; expected all turns of a conversation in one "
            'record, as in {"messages": [{"role": …, "content": …}, …]}: of a tree of answers (OpenAssistant), a record for each path.'
        )
    if plain in (None, "text") and is_spoken(first.fields):
        raise DataError(
            f"{capital(first.place)} is one turn of a conversation ({listed(first.fields, 12)}); expected all turns of a conversation in one record, "
            'as in {"messages": [{"role": …, "content": …}, …]}. To learn each as a text of its own, set data.form=text'
            f"{'' if plain else ' ' + columns_of({'text': spoken_in(first.fields)})}."
        )
    _require_one_answer(first, plain)
    nearest_form = suggested(first.fields, FORMS)
    if plain == "text" and nearest_form and nearest_form[0] != "text":
        name, theirs = nearest_form
        raise DataError(
            f"{capital(first.place)} has a text, and beside it {listed(theirs[one] for one in theirs if theirs[one] != 'text')}. Set "
            f"data.form=text to learn the text alone, or {columns_of(theirs)} to read the records as {name}."
        )
    if plain:
        if FORMS[plain].turns and reads(FORMS[plain], first.fields):
            _require_last_answer(first, plain)
        _require_all_read(records, plain)
        return plain
    heads = ", by the file's first row" if first.unit == "row" else ""
    found = (
        f"{capital(first.place)} has the fields {listed(first.fields, 12) or '(none)'}{heads}, which are no known form."
    )
    if nearest_form:
        name, theirs = nearest_form
        raise DataError(f"{found} As {name} they are read with {columns_of(theirs)}.")
    for outer, value in first.fields.items():
        if isinstance(value, dict) and (within := detect_form(value)) and reads(FORMS[within], value):
            theirs = {name: f"{outer}.{name}" for name in (*FORMS[within].needs, *FORMS[within].takes) if name in value}
            raise DataError(
                f"{capital(first.place)} has the form {within} inside its field {outer}; set {columns_of(theirs)}."
            )
    forms = "; ".join(f"{name} ({', '.join(form.needs)})" for name, form in FORMS.items())
    raise DataError(f"{found} {guess(first.fields)} The forms are {forms}.")


def _require_desired(records: Sequence[Record], form: str) -> None:
    """Refuse a set that says of some answers that they are bad, or not to be trained, by a field of the record."""
    place = capital(records[0].place)
    for name in dict.fromkeys(name for record in records for name in record.fields):
        values = [value for record in records if (value := record.fields.get(name)) is not None]
        if name in ("rejected", *OTHERS["rejected"]) and any(map(filled, values)):
            raise DataError(
                f"{place} has the form preference, {form} with '{name}'. Write its better answer as 'chosen' and that as 'rejected', "
                f"and set objective.name=dpo, to learn from both; or set data.form={form} to train the other answers alone."
            )
        if name in SURE_LABELS or LIKE_A_LABEL.search(name):
            said = [verdict(value) for value in values]
            if said and None not in said and (name in SURE_LABELS or False in said):
                columns = f" {columns_of({'label': name})}" if name != "label" else ""
                raise DataError(
                    f"{place} has the form kto, {form} with '{name}', which says whether the answer is desirable, and "
                    f"no objective learns from undesirable ones yet. Set data.form=kto{columns} to train the desirable answers "
                    f"alone, or data.form={form} if '{name}' says something else, and is not to be read."
                )
        if any(may_decide(name, value) for value in values):
            raise DataError(
                f"{place} has '{name}', which may say whether a record is trained, and by that name or value is not known here. "
                f"Leave out what is not to be trained, and set data.form={form} to train all the others alike."
            )


def _require_last_answer(record: Record, form: str) -> None:
    """Refuse turns that end with a question whose answer stands beside them."""
    turns = FORMS[form].needs[0]
    said = turns_of(record.fields[turns], turns)
    answer = next((n for n in ("completion", *OTHERS["completion"]) if str(record.fields.get(n) or "").strip()), None)
    if answer and said and said[-1].message["role"] == "user":
        raise DataError(
            f"{capital(record.place)} has turns that end with a question, and beside them {answer}. Set "
            f"{columns_of({'prompt': turns, 'completion': answer})} to read that as the answer, or data.form={form} to leave it out."
        )


def _require_one_answer(record: Record, form: str | None) -> None:
    """Refuse a preference set whose two answers have names of their own, or stand in a list."""
    several, verdicts = rivals(record.fields)
    if not several or not (form in (None, "text") or FORMS[form].turns):
        return
    others = suggested({name: value for name, value in record.fields.items() if name not in several}, FORMS)
    if form is None and others and others[0] != "text":
        return
    if form in ("messages", "sharegpt"):
        turns = record.fields[FORMS[form].needs[0]]
        if not isinstance(turns, list) or not turns or read_turn(turns[-1], len(turns)).message["role"] == "assistant":
            return
    says = f", of which {listed(verdicts)} may say which is better" if verdicts else ""
    raise DataError(
        f"{capital(record.place)} has the form preference, several answers to one question ({listed(several, 12)}){says}. Write the "
        "better one of each record as 'chosen' and another as 'rejected'; then set objective.name=dpo to learn from both, or "
        "data.form=preference to train the better ones alone."
    )


def _require_all_read(records: Sequence[Record], form: str) -> None:
    """Refuse records of a form in which a text stands that the form has a place for, by another name."""
    known, seen = {*FORMS[form].needs, *FORMS[form].takes}, set[str]()
    for record in records:
        if name := next(
            (name for name in _DOCUMENTS if isinstance(record.fields.get(name), list) and record.fields[name]), None
        ):
            raise DataError(
                f"{capital(record.place)} has the form {form}, and beside it {name}, which its answer may be about. Write them into "
                f"the question, or set data.form={form} to leave them out."
            )
        apart = [
            name
            for name, value in record.fields.items()
            if (isinstance(value, dict) and name.lower() in OTHERS["system"])
            or (isinstance(value, list) and value and name.lower() in OTHERS["tools"])
        ]
        new = {name for name, value in record.fields.items() if isinstance(value, str) and value.strip()}
        new = {*new, *apart} - known - seen
        seen |= new
        said = {name: value for name, value in record.fields.items() if filled(value)}
        best = suggested(said, FORMS) if new else None
        if best is None or not set(best[1].values()) >= set(FORMS[form].needs):
            continue
        name, theirs = best
        read = json.dumps([record.fields[one] for one in known if one in record.fields], default=str)
        more = [
            one
            for one in theirs.values()
            if one in new and (one in apart or json.dumps(record.fields[one].strip())[1:-1] not in read)
        ]
        if more:
            raise DataError(
                f"{capital(record.place)} has the form {form}, and beside it {listed(more)}. Set {columns_of(theirs)} to read that "
                f"as well (as {name}), or data.form={form} to leave it out."
            )
