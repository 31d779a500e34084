"""Names of columns say whose pictures these are, in six languages and as people write them."""

import pytest

from derm_compress.data.identity_names import owner, words

OWNERS = {
    "person": """
        patient|patients|Patient ID|PATIENTID|patientid|PatientNo|IDPatient|patient_uid|patient-uuid
        Patient Name|Patient's ID|patient number|patient no.|patient #|patient hash|anon_patient_id
        patient_id_anon|study_subject_id|subject|subject no|Individual|person_code|participant.key
        MRN|pid|ptid|patno|USUBJID|subjid
        Patienten-Nr|Patientennummer|Patientenkennung|Probanden-Nr.|Teilnehmer
        paciente|id_paciente|número de paciente|Nº paciente|nombre del paciente|sujeto|pessoa
        código do paciente|participante_id|sujet|Code du patient|numéro_sujet|codice_paziente
        nome paziente|soggetto""",
    "case": "case|cases|case_num|caseNo|Fall-Nr|Fallnummer|Fälle|caso|ID caso|cas",
    "lesion": """
        lesion|Lesion |LESION-ID|lesionId|lesion no.|lesion_hash|skin_lesion_id|Läsion
        Läsionsnummer|lésion|lesão_id|ID lesione|lesion_uid|mole_id""",
    "group": "group|groups|group_id|Gruppe|grupo",
    "": """
        id|name|image_name|file_name|image_id|diagnosis|site|age|sex|localization|casein|casual
        age_group|age_group_id|control group|patient_group|patient_sex|patient age|sexe du patient
        edad_paciente|lesion_type|lesion size|personal_history|visit_id|lesion_name|group_name
        number_of_lesions|n_lesions|num_lesions|numlesions|no_of_cases|lesion_count
        nombre de lésions|número de lesiones""",
}


@pytest.mark.parametrize("kind", OWNERS)
def test_a_name_says_whose_the_pictures_are(kind):
    lines = OWNERS[kind].strip().splitlines()
    columns = [column for line in lines for column in line.strip().split("|")]
    found = {column: owner(column) for column in columns}
    assert found == dict.fromkeys(columns, kind)
    assert owner("") == owner("123") == ""


def test_words_are_parted_by_signs_case_and_habit():
    assert words("PatientID") == words("patient_id") == words("PATIENTID") == ["patient", "id"]
    assert words("Läsions-Nr. 2") == ["lasions", "nr"]
    assert words("age_approx") == ["age", "approx"]
