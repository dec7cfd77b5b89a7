// What the pages ask of the service.
const TRIES = 60;

// An answer that is not one is an Error with the service's own words and its word for the kind; a run that is being
// loaded is waited for, and `tell` told so.
export async function call(address, options, aborted, tell) {
  for (let tries = 1; ; tries++) {
    const response = await fetch(address, { ...options, signal: aborted });
    if (response.status === 401) {
      location.assign("/ui/login?next=" + encodeURIComponent(location.pathname + location.search) + location.hash);
      throw new Error("An API key is needed.");
    }
    if (response.ok) return response;
    const type = response.headers.get("content-type") ?? "";
    const body = type.startsWith("application/json") ? await response.json() : { error: `the service answered ${response.status}` };
    if (body.error_type !== "loading" || tries === TRIES) throw Object.assign(new Error(body.error), { kind: body.error_type, detail: body.detail });
    tell(body.error + " …");
    await new Promise((done) => setTimeout(done, 1000));
  }
}

export const json = (body, method = "POST") => ({ method, body: JSON.stringify(body), headers: { "Content-Type": "application/json" } });
