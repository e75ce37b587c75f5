"""Names of people and small items for stories and problems."""

NAMES = (
    "Ana", "Ben", "Carl", "Dana", "Emma", "Finn", "Gina", "Hugo", "Ida", "Jack", "Kate", "Leo", "Mia", "Nora",
    "Otto", "Paul", "Rosa", "Sam", "Tina", "Uma", "Vera", "Will", "Yara", "Zoe", "Adam", "Bella", "Clara", "David",
    "Erik", "Frida", "Greta", "Hanna", "Ivan", "Julia", "Karl", "Lena", "Marta", "Nico", "Olga", "Peter",
)  # fmt: skip
ITEMS = (
    "apples", "books", "cards", "coins", "cups", "eggs", "keys", "marbles", "nuts", "pens", "pears", "plates",
    "shells", "stamps", "stones", "toys",
)  # fmt: skip
