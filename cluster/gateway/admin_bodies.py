"""Bodies of the operators' API."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field


class MigrateBody(BaseModel):
    """``POST /admin/migrate``; without a destination the freest other instance is taken."""

    request_id: Annotated[str, Field(min_length=1)]
    destination: str | None = None


class InstanceBody(BaseModel):
    """``POST /admin/resume``."""

    instance_id: Annotated[str, Field(min_length=1)]


class DrainBody(InstanceBody):
    """``POST /admin/drain``."""

    until_restart: bool = False


class RoleBody(InstanceBody):
    """``POST /admin/role``."""

    role: Literal["mixed", "prefill", "decode"]


class TenantBody(BaseModel):
    """``PATCH /admin/tenants/TENANT``; what is not given stays."""

    model_config = ConfigDict(extra="forbid", strict=True)

    weight: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    max_queued: Annotated[int, Field(ge=0)] | None = None
    classes: (
        Annotated[list[Literal["interactive", "standard", "batch"]], Field(min_length=1)] | None
    ) = None


class PoliciesBody(BaseModel):
    """``PATCH /admin/policies``; what is not given stays."""

    model_config = ConfigDict(extra="forbid", strict=True)

    placement: Annotated[str, Field(min_length=1)] | None = None
    rebalance: bool | None = None
    dry_run: bool = False
