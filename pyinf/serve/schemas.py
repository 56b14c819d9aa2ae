"""What goes in and what comes out, as JSON. Types are strict: ``"5"`` is no number, ``true`` no integer."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

__all__ = [
    "ErrorResponse",
    "HealthResponse",
    "InfoResponse",
    "RecallStatement",
    "SearchRequest",
    "SearchResponse",
    "SearchResult",
]

TokenId = Annotated[int, Field(ge=0, lt=2**31)]
Label = Annotated[int, Field(ge=-100, lt=2**31)]


class SearchRequest(BaseModel):
    """One query: `prompt` and `completion` (the completion is what is asked about), or `text`, or `input_ids`."""

    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        json_schema_extra={
            "examples": [
                {"prompt": "When was the calendar introduced?", "completion": "In 1582.", "k": 5},
                {"text": "The calendar was introduced in 1582."},
                {"input_ids": [12, 7, 301], "labels": [-100, 7, 301], "k": 20},
            ]
        },
    )

    prompt: str | None = Field(None, description="What the model was given; it sets the scene and is not counted.")
    completion: str | None = Field(None, description="What the model said; the documents behind this are looked for.")
    text: str | None = Field(None, description="Instead of prompt and completion: every token counts.")
    input_ids: list[TokenId] | None = Field(None, min_length=2, description="Instead of text: token ids.")
    labels: list[Label] | None = Field(
        None, description="With input_ids: the same ids, −100 where a position does not count. Default: all count."
    )
    k: int = Field(10, ge=1, le=1_000_000, description="Documents wanted; at most as many as /info says.")
    documents: bool = Field(True, description="Whether to send the text and the metadata of the documents.")

    @model_validator(mode="after")
    def _one_form(self) -> SearchRequest:
        given = [name for name in ("text", "input_ids") if getattr(self, name) is not None]
        if self.prompt is not None or self.completion is not None:
            given.append("prompt and completion")
        if len(given) != 1:
            raise ValueError("give prompt and completion, or text, or input_ids: exactly one of the three")
        if given == ["prompt and completion"] and (self.prompt is None or not self.completion):
            raise ValueError("prompt and completion belong together, and the completion must not be empty")
        if self.text is not None and not self.text:
            raise ValueError("the text is empty")
        if self.labels is not None:
            if self.input_ids is None:
                raise ValueError("labels go with input_ids")
            if len(self.labels) != len(self.input_ids):
                raise ValueError("labels and input_ids must have the same length")
            if any(-100 < label < 0 for label in self.labels):
                raise ValueError("a label is −100 or a token id")
        for name in ("prompt", "completion", "text"):
            try:
                (getattr(self, name) or "").encode()
            except UnicodeEncodeError:
                raise ValueError(f"{name} holds half a surrogate pair; repair its encoding") from None
        return self

    def record(self) -> dict[str, str] | None:
        """The text as a row of a data file; None: token ids were given."""
        if self.text is not None:
            return {"text": self.text}
        if self.completion is not None:
            return {"prompt": self.prompt or "", "response": self.completion}
        return None


class SearchResult(BaseModel):
    """One document."""

    rank: int = Field(description="From 1.")
    id: int = Field(description="The example's number in the training set.")
    position: int | None = Field(None, description="The token's position, where the store has a row a token.")
    score: float = Field(
        description="Influence; positive: a proponent; removing it makes the model say this less likely."
    )
    first_stage: float = Field(description="The score by the store's compressed rows.")
    text: str | None = Field(None, description="The document's text, where the store keeps it.")
    cut: bool = Field(False, description="Whether the text was cut for this answer.")
    metadata: dict[str, Any] = Field(default_factory=dict, description="Whatever else the store keeps beside it.")


class RecallStatement(BaseModel):
    """The share of the exact top k that is found, estimated from a random sample of documents with exact scores."""

    model_config = ConfigDict(extra="allow")

    k: int
    value: float
    low: float
    high: float
    level: float = Field(description="Confidence of the interval from low to high.")
    cut: int = Field(description="Candidates whose scores were computed exactly.")
    sample: int = Field(description="Documents in the sample.")
    queries: int = Field(1, description="Queries that shared the search; the recall is their mean.")


class QueryFacts(BaseModel):
    """What was searched for."""

    tokens: int
    counted: int = Field(description="Tokens that the loss counts.")


class Timing(BaseModel):
    """Where the time went."""

    waited: float = Field(description="Seconds in the queue.")
    search: float = Field(description="Seconds of the search.")
    batch: int = Field(description="Queries that shared the search.")


class SearchResponse(BaseModel):
    """Documents, best first, with what is known about how good the answer is."""

    results: list[SearchResult]
    exact: bool = Field(description="True: scores computed again from the gradients. False: of the compressed rows.")
    recall: RecallStatement | None = Field(description="None: not measured.")
    prefilter_recall: RecallStatement | None = Field(None, description="The same of a prefilter, where one is used.")
    certificate: Any = Field(None, description="How far the inverse was solved, as the library reports it; or null.")
    note: str = Field(description="In words: what the scores are, and what is known of what was missed.")
    query: QueryFacts
    timing: Timing
    documents_searched: int


class InfoResponse(BaseModel):
    """What this service searches, and its limits."""

    model_config = ConfigDict(extra="allow")

    pyinf: str
    documents: int
    reads_text: bool = Field(description="False: there is no tokenizer here, send input_ids.")
    max_tokens: int
    max_k: int
    max_body_bytes: int
    vocabulary: int | None
    searcher: dict[str, Any]
    queue: dict[str, int]


class HealthResponse(BaseModel):
    """Whether queries are taken."""

    status: str = Field(description="ok, or stopping.")


class ErrorDetail(BaseModel):
    """What is wrong."""

    code: str = Field(description="A word for programs.")
    message: str = Field(description="A sentence for people.")
    fields: list[dict[str, str]] | None = Field(None, description="For 422: which field, and what is wrong with it.")
    incident: str | None = Field(None, description="For 500: under which number the server's log has it.")


class ErrorResponse(BaseModel):
    """Every answer that is not a success."""

    error: ErrorDetail
