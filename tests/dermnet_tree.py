"""A folder tree with DermNet's real folder and file names, traps included, and drawn pictures."""

from blotches import picture

from derm_compress.data.preset import read_preset

RULES = read_preset("dermnet").names
ACNE, ECZEMA, NAILS, PSORIASIS, TUMORS, CANCER, MOLES, IVY, ATOPIC, BULLOUS, VIRAL = (
    "Acne and Rosacea Photos",
    "Eczema Photos",
    "Nail Fungus and other Nail Disease",
    "Psoriasis pictures Lichen Planus and related diseases",
    "Seborrheic Keratoses and other Benign Tumors",
    "Actinic Keratosis Basal Cell Carcinoma and other Malignant Lesions",
    "Melanoma Skin Cancer Nevi and Moles",
    "Poison Ivy Photos and other Contact Dermatitis",
    "Atopic Dermatitis Photos",
    "Bullous Disease Photos",
    "Warts Molluscum and other Viral Infections",
)
# (folder, name, disease in the wide reading; "" where it is none)
NAMES = [
    (ACNE, "rosacea-8.jpg", "rosacea"),
    (ACNE, "07RosaceaFulFAce.jpg", "rosacea"),
    (ACNE, "rhinophyma-12.jpg", "rosacea"),
    (ACNE, "07Rhinophyma1.jpg", "rosacea"),
    (ACNE, "07rhnophymas0321051.jpg", "rosacea"),
    (ACNE, "ROSACEA-9.JPG", "rosacea"),
    (ACNE, "07PerioralDermEye.jpg", ""),
    (ACNE, "Hidradenitis-Suppurativa-Areola-2.jpg", ""),
    (ACNE, "acne-histology-4.jpg", ""),
    (ACNE, "perioral-dermatitis-4.jpg", "dermatitis"),
    (CANCER, "actinic-keratosis-face-3.jpg", "actinic keratosis"),
    (CANCER, "arsenical-keratoses-1.jpg", ""),
    (CANCER, "basal-cell-carcinoma-nose-7.jpg", "basal cell carcinoma"),
    (CANCER, "basal-cell-carcinoma-histology-2.jpg", ""),
    (CANCER, "basal-cell-nevus-syndrome-5.jpg", ""),
    (CANCER, "Forest-2.jpg", ""),
    (MOLES, "malignant-melanoma-3.jpg", "melanoma"),
    (MOLES, "lentigo-maligna-11.jpg", "melanoma"),
    (MOLES, "melanoma-mimic-1.jpg", ""),
    (MOLES, "atypical-nevi-21.jpg", ""),
    (MOLES, "11IMG001.jpg", ""),
    (NAILS, "nail-melanoma-2.jpg", ""),
    (NAILS, "psoriasis-nail-20.jpg", "psoriasis"),
    (NAILS, "lichen-planus-nail-6.jpg", "lichen planus"),
    (NAILS, "eczema-nail-1.jpg", ""),
    (PSORIASIS, "08Psoriasis0213.jpg", "psoriasis"),
    (PSORIASIS, "8Psoriasis2.jpg", "psoriasis"),
    (PSORIASIS, "psoriasis-histology-3.jpg", ""),
    (PSORIASIS, "lichen-planus-44.jpg", "lichen planus"),
    (PSORIASIS, "lichen-planopilaris-2.jpg", ""),
    (PSORIASIS, "lichen-sclerosus-skin-8.jpg", ""),
    (PSORIASIS, "08SebDerm0128.jpg", "dermatitis"),
    (TUMORS, "seborrheic-keratoses-ruff-15.jpg", "seborrheic keratosis"),
    (TUMORS, "dermatosis-papulosa-nigra-4.jpg", "seborrheic keratosis"),
    (TUMORS, "stucco-keratoses-3.jpg", "seborrheic keratosis"),
    (TUMORS, "chondrodermatitis-nodularis-6.jpg", ""),
    (ECZEMA, "seborrheic-dermatitis-30.jpg", "dermatitis"),
    (ECZEMA, "stasis-dermatitis-81.jpg", "dermatitis"),
    (ECZEMA, "eczema-hand-9.jpg", "dermatitis"),
    (ECZEMA, "lichen-simplex-chronicus-7.jpg", ""),
    (ATOPIC, "05Atopic012604.jpg", "dermatitis"),
    (IVY, "rhus-dermatitis-14.jpg", "dermatitis"),
    (BULLOUS, "dermatitis-herpetiformis-2.jpg", ""),
    (VIRAL, "eczema-herpeticum-5.jpg", ""),
]


def draw(path, seed):
    path.parent.mkdir(parents=True, exist_ok=True)
    picture(seed, size=(64, 48)).save(path, "JPEG", quality=90)


def plant(root, each=6):
    """train/ and test/ with all of NAMES, and `each` more of every disease in both; how many."""
    for folder in RULES.folders:
        for split in ("train", "test"):
            (root / split / folder).mkdir(parents=True)
    names = [(("train", "test")[i % 2], folder, name) for i, (folder, name, _) in enumerate(NAMES)]
    where = {disease: folder for folder, _, disease in NAMES}
    for split in ("train", "test"):  # numbered alike: the same folder and name on both sides
        for disease, rule in RULES.diseases.items():
            prefix = rule.prefixes[0]
            names += [(split, where[disease], f"{prefix}-{100 + i}.jpg") for i in range(each)]
    for seed, (split, folder, name) in enumerate(names):
        draw(root / split / folder / name, seed)
    return len(names)
