"""The published data sets in their exact layouts, quirks included, with tiny drawn pictures."""

import csv

from blotches import picture

from derm_compress.data.preset import read_preset


def draw(root, names, seed=0):
    for i, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(1000 * seed + i, size=(48, 40)).save(path)


def write(path, header, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header.split(","), *rows])


def pad(root):
    """Pictures in three parts; two lesions of a patient; nevi and carcinomas that are left out."""
    labels = ["BCC", "ACK", "MEL", "SEK", "NEV", "SCC"]
    rows = []
    for i in range(24):
        label, patient = labels[i % 6], f"PAT_{i // 2}"
        rows.append((patient, 100 + i // 2, label, f"{patient}_{100 + i // 2}_{i}.png"))
    header = "patient_id,lesion_id,smoke,age,gender,fitspatrick,diagnostic,img_id,biopsed"
    table = [(p, n, "False", 40, "MALE", f"{n % 6}.0", d, f, "True") for p, n, d, f in rows]
    write(root / "metadata.csv", header, table)
    draw(root, [f"imgs_part_{i % 3 + 1}/{row[3]}" for i, row in enumerate(rows)], 1)


def ham10000(root):
    """Names without suffix, some pictures in both parts, four pictures of a lesion at most."""
    labels = ["nv", "mel", "bkl", "bcc", "akiec", "vasc", "df"]
    rows, names = [], []
    for lesion in range(14):
        for k in range(1 + lesion % 4):
            name = f"ISIC_{24306 + len(rows):07d}"
            rows.append((f"HAM_{lesion:07d}", name, labels[lesion % 7], "histo", "80.0", "male"))
            names.append(f"HAM10000_images_part_{1 + k % 2}/{name}.jpg")
    header = "lesion_id,image_id,dx,dx_type,age,sex,localization"
    write(root / "HAM10000_metadata.csv", header, [(*row, "scalp") for row in rows])
    draw(root, names, 2)
    other = root / "ham10000_images_part_1"  # Kaggle has the first part twice
    other.mkdir(exist_ok=True)
    for path in sorted((root / "HAM10000_images_part_1").iterdir()):
        (other / path.name).write_bytes(path.read_bytes())


def isic_2019(root):
    """One-hot truth in one csv, identities in another, some without a lesion; `_downsampled`."""
    columns = ["MEL", "NV", "BCC", "AK", "BKL", "DF", "VASC", "SCC", "UNK"]
    truth, about, names = [], [], []
    for i in range(36):
        name = f"ISIC_{i:07d}" + "_downsampled" * (i % 5 == 0)
        truth.append((name, *[f"{float(column == i // 2 % 9):.1f}" for column in range(9)]))
        lesion = "" if i < 4 else f"BCN_{i // 2:07d}"
        about.append((name, "55.0", "anterior torso", lesion, "female"))
        names.append(f"ISIC_2019_Training_Input/ISIC_2019_Training_Input/{name}.jpg")
    write(root / "ISIC_2019_Training_GroundTruth.csv", ",".join(["image", *columns]), truth)
    header = "image,age_approx,anatom_site_general,lesion_id,sex"
    write(root / "ISIC_2019_Training_Metadata.csv", header, about)
    draw(root, names, 3)


def fitzpatrick17k(root):
    """Pictures by md5hash, most of 114 labels none of the study's, wrong labels marked in qc."""
    labels = [*read_preset("fitzpatrick17k").table.labels, "acne vulgaris", "scabies"]
    rows = []
    for i, label in enumerate(labels * 2):
        digest = f"{i * 7919 + 13:032x}"
        qc = "3 Wrongly labelled" if i == 3 else ""
        scale = i % 7 or -1
        url = "https://atlas.example/img.jpg"
        rows.append((digest, scale, scale, label, "inflammatory", "benign", qc, url, "a.jpg"))
    header = "md5hash,fitzpatrick_scale,fitzpatrick_centaur,label,nine_partition_label,"
    header += "three_partition_label,qc,url,url_alphanum"
    write(root / "fitzpatrick17k.csv", header, rows)
    draw(root, [f"images/{row[0]}.jpg" for row in rows], 4)


def scin(root):
    """One to three pictures a case, weights as text, cases undecided or unlabelled, one repeat."""
    labels = [
        "{'Eczema': 0.67, 'Psoriasis': 0.33}",
        "{'Psoriasis': 1.0}",
        "{'SK/ISK': 0.5, 'Rosacea': 0.5}",
        "{}",
        "{'Lichen planus/lichenoid eruption': 0.6, \"Kaposi's sarcoma of skin\": 0.4}",
        "{'Tinea': 1.0}",
    ]
    cases, truth, names = [], [], []
    for i in range(18):
        case = str(-(10**18) - i)
        paths = [f"dataset/images/{case}{k}.png" for k in range(1 + i % 3)]
        names += paths
        cases.append((case, "SCIN", "AGE_30_TO_39", "FEMALE", "FST2", *(paths + ["", ""])[:3]))
        truth.append((case, labels[i % 6], "FST3", "FST4", ""))
    cases[6] = (*cases[6][:6], cases[0][5], "")  # a picture of the first case again
    header = "case_id,source,age_group,sex_at_birth,fitzpatrick_skin_type,"
    header += "image_1_path,image_2_path,image_3_path"
    write(root / "scin_cases.csv", header, cases)
    skin = "dermatologist_fitzpatrick_skin_type_label_"
    header = f"case_id,weighted_skin_condition_label,{skin}1,{skin}2,{skin}3"
    write(root / "scin_labels.csv", header, truth)
    draw(root, [name.removeprefix("dataset/") for name in names], 5)


def ddi(root):
    """A first column without a name, labels with hyphens, three groups of skin tone."""
    labels = ["melanoma-in-situ", "seborrheic-keratosis-irritated", "basal-cell-carcinoma"]
    labels += ["nodular-melanoma-(nm)", "verruca-vulgaris", "psoriasis"]
    rows = []
    for i in range(24):
        tone = (12, 34, 56)[i % 3]
        rows.append((i, i + 1, f"{i + 1:06d}.png", tone, i % 6 in (0, 2, 3), labels[i % 6]))
    write(root / "ddi_metadata.csv", ",DDI_ID,DDI_file,skin_tone,malignant,disease", rows)
    draw(root, [row[2] for row in rows], 6)


def derm7pt(root):
    """Two pictures a case, the csv in meta/, names in another case than the files."""
    labels = ["melanoma (in situ)", "basal cell carcinoma", "seborrheic keratosis", "clark nevus"]
    rows, names = [], []
    for i in range(16):
        clinic, derm = f"NEL/Nel{i:03d}.jpg", f"NEL/NEL{i + 500:03d}.jpg"
        rows.append((i + 1, labels[i % 4], 3, "back", "female", clinic, derm, "", ""))
        names += [f"images/{clinic.upper().replace('.JPG', '.jpg')}", f"images/{derm}"]
    header = "case_num,diagnosis,seven_point_score,location,sex,clinic,derm,case_id,notes"
    write(root / "meta" / "meta.csv", header, rows)
    write(root / "meta" / "train_indexes.csv", "indexes", [[i] for i in range(8)])
    draw(root, names, 7)


LAYOUTS = {
    "pad-ufes-20": pad,
    "ham10000": ham10000,
    "isic-2019": isic_2019,
    "fitzpatrick17k": fitzpatrick17k,
    "scin": scin,
    "ddi": ddi,
    "derm7pt": derm7pt,
}
