// Lists this pack's templates in the order of learning, those that need no download first: the server lists them in the
// order of the disk.
import { app } from "../../scripts/app.js";

const FIRST = "01 First look (small)";

function place(name) {
  return `${name.endsWith("(small)") ? 0 : 1} ${name}`;
}

app.registerExtension({
  name: "FeedFace.Templates",
  init() {
    const { api } = app;
    const list = api.getWorkflowTemplates;
    api.getWorkflowTemplates = async function (...given) {
      const listed = await list.apply(this, given);
      for (const names of Object.values(listed ?? {})) {
        if (names?.includes?.(FIRST)) names.sort((one, other) => place(one).localeCompare(place(other), "en"));
      }
      return listed;
    };
  },
});
