"""Judge the models, and judge the judges.

`audit_folders` compares folders of generated images with real ones; `biorewards.audit.lesions` damages images by known
doses, so that verifiers can be held to account.
"""

from biorewards.audit.models import Audit, audit
from biorewards.audit.page import write_page
from biorewards.audit.run import Audited, audit_folders

__all__ = ["Audit", "Audited", "audit", "audit_folders", "write_page"]
