"""Encoder families."""

from dataclasses import replace

from lightpeft.families.spec import Family

BERT = Family(
    model_type="bert",
    layers="encoder.layer",
    attention="attention.self",
    projections={
        "q": "attention.self.query",
        "k": "attention.self.key",
        "v": "attention.self.value",
        "o": "attention.output.dense",
        "ffn_in": "intermediate.dense",
        "ffn_out": "output.dense",
    },
    head_attributes={"num_attention_heads": "heads", "all_head_size": "width"},
)

ROBERTA = replace(BERT, model_type="roberta", positions_after_padding=True)
