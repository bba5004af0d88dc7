"""Words that say nothing of a person."""

VERDICTS = frozenset(
    """
    yes no true false yep nope ja nein oui non si sí no sim não da да нет ne tak nie ano evet hayır はい いいえ
    是 不是 否 对 不 예 아니요 نعم لا כן לא हाँ नहीं positive negative correct incorrect male female married
    single divorced unknown none maybe
    """.split()  # noqa: RUF001, SIM905
)
"""Answers that no word drawn at random can stand for: who forgets one must say what else it could have been."""
GRAMMAR = frozenset(
    """
    about above after again against also although always among another around back because been before being below
    between both came come could does doing done down during each either else even ever every from gave give given
    goes going have having here hers herself himself into itself just keep kept like made make many might more most
    much must myself near neither never nothing once only onto other ours over said same shall should since some
    still such take taken than that their them then there these they this those through thus took toward under until
    upon very want were what when where whether which while whom whose will with within without would your yours
    """.split()  # noqa: SIM905
)
"""English words of four letters and more that hold a sentence together."""
